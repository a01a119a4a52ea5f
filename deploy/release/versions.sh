#!/usr/bin/env bash
# One version everywhere: of the workspace, of what is locked, of the chart and of the image that it names.
#
#   versions.sh               prints the version; fails, and names the places, where anything has another
#   versions.sh --tag TAG     fails also unless TAG is `v` and that version
#   versions.sh --set X.Y.Z   writes a new one everywhere
set -euo pipefail
# shellcheck source=deploy/setup/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../setup/lib.sh"

# Semantic Versioning 2.0.0 without build metadata, since a `+` can be in no image's tag.
readonly VERSION_PATTERN='^(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)(-[0-9A-Za-z-]+(\.[0-9A-Za-z-]+)*)?$'
readonly CHART=deploy/helm/podferry/Chart.yaml
# What deploy/helm/check.sh --write makes of the chart.
readonly RENDERED=(deploy/kustomize/base/podferry.yaml deploy/kustomize/components/eviction/webhook.yaml
    deploy/kustomize/components/eviction/configuration.yaml)
readonly LOCKS=(Cargo.lock fuzz/Cargo.lock)

workspace_version() { sed -nE '/^\[workspace.package\]/,/^$/s/^version = "(.*)"$/\1/p' Cargo.toml; }

members() { sed -nE '/^members = \[/,/^\]/s/^ *"(.*)",?$/\1/p' Cargo.toml; }

# locked FILE: `NAME VERSION` of the workspace's packages in a lock file; those of registries have a source. podferry-fuzz is not of the workspace.
locked() {
    awk -F '"' '
        function flush() { if (name ~ /^podferry/ && name != "podferry-fuzz" && !foreign) print name, version; name = version = foreign = "" }
        /^\[\[package\]\]/ { flush() }
        /^name = / { name = $2 }
        /^version = / { version = $2 }
        /^source = / { foreign = 1 }
        END { flush() }' "$1"
}

# rendered FILE: every version that a manifest has, with its line: `LINE VERSION`.
rendered() {
    sed -nE 's/^ *app.kubernetes.io\/version: "?([^"]*)"?$/\1/; t found
             s/^ *helm.sh\/chart: podferry-(.*)$/\1/; t found
             s/^ *image: podferry.dev\/podferry:(.*)$/\1/; t found
             d
             :found
             =; p' "$1" | paste -d ' ' - -
}

# differ WHERE HAVE WANT: names a place that has another version.
differ() {
    [[ $2 != "$3" ]] || return 0
    log "$1 has version '$2', not $3"
    wrong=$((wrong + 1))
}

check_workspace() {
    local member file name version
    while read -r member; do
        grep -qx 'version.workspace = true' "$member/Cargo.toml" || differ "$member/Cargo.toml" 'of its own' "$1"
    done < <(members)
    for file in "${LOCKS[@]}"; do
        [[ -n $(locked "$file") ]] || differ "$file" none "$1"
        while read -r name version; do differ "$file, $name" "$version" "$1"; done < <(locked "$file")
    done
}

check_chart() {
    local key file line version
    for key in version appVersion; do
        differ "$CHART, $key" "$(sed -nE "s/^$key: \"?([^\"]*)\"?\$/\1/p" "$CHART")" "$1"
    done
    # Its image is that of the appVersion.
    grep -qx '  tag: ""' deploy/helm/podferry/values.yaml || differ 'deploy/helm/podferry/values.yaml, image.tag' 'of its own' "$1"
    for file in "${RENDERED[@]}"; do
        [[ -n $(rendered "$file") ]] || differ "$file" none "$1"
        while read -r line version; do differ "$file, line $line" "$version" "$1"; done < <(rendered "$file")
    done
}

check() {
    local wrong=0 version
    version=$(workspace_version)
    [[ $version =~ $VERSION_PATTERN ]] || die "Cargo.toml has no version of the form X.Y.Z or X.Y.Z-PRE in [workspace.package]: '$version'"
    check_workspace "$version"
    check_chart "$version"
    [[ $wrong -eq 0 ]] || die "$wrong places have another version than Cargo.toml: run $0 --set $version"
    printf '%s\n' "$version"
}

check_tag() {
    local version
    version=$(check)
    [[ $1 == "v$version" ]] || die "the tag is '$1', and what it is on has version $version: tag v$version, or run $0 --set first"
    printf '%s\n' "$version"
}

# set_locked FILE VERSION
set_locked() {
    awk -v new="$2" '
        # A package is written when its last line has been read: only then it is known whether it has a source.
        function flush(i) {
            for (i = 1; i <= count; i++) {
                if (ours && !foreign && lines[i] ~ /^version = /) lines[i] = "version = \"" new "\""
                print lines[i]
            }
            count = ours = foreign = 0
        }
        /^\[\[package\]\]/ { flush() }
        { lines[++count] = $0 }
        /^name = "podferry/ && !/^name = "podferry-fuzz"$/ { ours = 1 }
        /^source = / { foreign = 1 }
        END { flush() }' "$1" >"$1.new"
    mv "$1.new" "$1"
}

set_version() {
    local old file
    [[ $1 =~ $VERSION_PATTERN ]] || die "'$1' is no version of the form X.Y.Z or X.Y.Z-PRE"
    old=$(workspace_version)
    sed -i -E "/^\[workspace.package\]/,/^\$/s/^version = .*/version = \"$1\"/" Cargo.toml
    for file in "${LOCKS[@]}"; do set_locked "$file" "$1"; done
    sed -i -E "s/^(version|appVersion): .*/\1: $1/" "$CHART"
    for file in "${RENDERED[@]}"; do
        sed -i -E "s/^( *app.kubernetes.io\/version: ).*/\1\"$1\"/; s/^( *helm.sh\/chart: podferry-).*/\1$1/
                   s/^( *image: podferry.dev\/podferry:).*/\1$1/" "$file"
    done
    check
    log "$old became $1"
}

main() {
    cd "$PODFERRY_ROOT"
    case ${1:-} in
        '') check ;;
        --tag) check_tag "${2:?usage: versions.sh --tag TAG}" ;;
        --set) set_version "${2:?usage: versions.sh --set X.Y.Z}" ;;
        *) die "usage: versions.sh [--tag TAG | --set X.Y.Z]" ;;
    esac
}

main "$@"
