#!/usr/bin/env bash
# Tests the scripts of a release, without building anything: that a version which is wrong anywhere is found, that notes are cut right, that archives do not
# depend on who packs them. One line for each case, then one of JSON.
set -euo pipefail
# shellcheck source=deploy/release/sbom.sh
. "$(dirname "${BASH_SOURCE[0]}")/sbom.sh"

readonly CASES=(
    a_tree_of_one_version_passes
    another_version_anywhere_is_found
    a_tag_has_to_be_the_version
    a_version_that_is_set_is_set_everywhere
    what_is_no_version_is_refused
    notes_are_the_section_of_the_version
    notes_of_a_version_without_a_section_are_refused
    an_archive_is_the_same_whoever_packs_it
    an_archive_has_other_bytes_for_other_files
    bills_become_one
)

work=''
passed=0

# What the scripts read, apart from the real tree: $work/tree.
copy_tree() {
    rm -rf "$work/tree"
    mkdir -p "$work/tree/deploy/release"
    (cd "$PODFERRY_ROOT" && git ls-files -z '*Cargo.toml' '*Cargo.lock' CHANGELOG.md deploy/helm/podferry/Chart.yaml deploy/helm/podferry/values.yaml \
        deploy/kustomize deploy/setup/lib.sh | xargs -0 cp --parents -t "$work/tree")
    cp "$PODFERRY_ROOT"/deploy/release/*.sh "$work/tree/deploy/release/"
}

versions() { "$work/tree/deploy/release/versions.sh" "$@" 2>"$work/said"; }
notes() { "$work/tree/deploy/release/notes.sh" "$@" 2>"$work/said"; }

a_tree_of_one_version_passes() {
    local version
    version=$(versions)
    [[ $version =~ ^[0-9]+\.[0-9]+\.[0-9]+ ]]
}

# change FILE SCRIPT: one place has another version, which is found and named.
change() {
    copy_tree
    sed -i -E "$2" "$work/tree/$1"
    ! cmp -s "$PODFERRY_ROOT/$1" "$work/tree/$1" || { echo "'$2' changes nothing in $1"; return 1; }
    ! versions || { echo "'$2' in $1 is not found"; return 1; }
    grep -qF "$3" "$work/said" || { cat "$work/said"; return 1; }
}

another_version_anywhere_is_found() {
    local file
    # The first of the workspace's packages, and the last.
    for file in Cargo.lock fuzz/Cargo.lock; do
        change "$file" '/^name = "podferry-common"$/,/^$/s/^version = .*/version = "9.9.9"/' "$file, podferry-common"
        change "$file" '/^name = "podferry-transfer"$/,/^$/s/^version = .*/version = "9.9.9"/' "$file, podferry-transfer"
    done
    change deploy/helm/podferry/Chart.yaml 's/^version: .*/version: 9.9.9/' 'Chart.yaml, version'
    change deploy/helm/podferry/Chart.yaml 's/^appVersion: .*/appVersion: 9.9.9/' 'Chart.yaml, appVersion'
    change deploy/helm/podferry/values.yaml 's/^  tag: ""/  tag: "9.9.9"/' image.tag
    change agent/Cargo.toml 's/^version.workspace = true/version = "9.9.9"/' agent/Cargo.toml
    change deploy/kustomize/base/podferry.yaml '0,/image: podferry/s/(image: .*):.*/\1:9.9.9/' base/podferry.yaml
    change deploy/kustomize/base/podferry.yaml '0,/app.kubernetes.io.version/s/(app.kubernetes.io\/version: ).*/\1"9.9.9"/' base/podferry.yaml
    change deploy/kustomize/components/eviction/webhook.yaml '0,/chart: podferry/s/(chart: podferry-).*/\19.9.9/' webhook.yaml
}

a_tag_has_to_be_the_version() {
    local version tag
    version=$(versions)
    [[ $(versions --tag "v$version") == "$version" ]]
    for tag in "$version" "v$version-rc.1" v "V$version" "v$version "; do
        ! versions --tag "$tag" || { echo "'$tag' passes"; return 1; }
    done
}

a_version_that_is_set_is_set_everywhere() {
    local old
    old=$(versions)
    [[ $(versions --set 3.2.1-rc.4) == 3.2.1-rc.4 && $(versions --tag v3.2.1-rc.4) == 3.2.1-rc.4 ]]
    # And nowhere else: set back, the tree is what it was.
    versions --set "$old"
    (cd "$work/tree" && find . -type f -exec cmp {} "$PODFERRY_ROOT/{}" \;) >"$work/differ"
    [[ ! -s $work/differ ]] || { cat "$work/differ"; return 1; }
}

what_is_no_version_is_refused() {
    local version
    for version in '' 1 1.2 v1.2.3 1.2.3+build 01.2.3 '1.2.3 '; do
        ! versions --set "$version" || { echo "'$version' passes"; return 1; }
    done
}

notes_are_the_section_of_the_version() {
    cat >"$work/tree/CHANGELOG.md" <<'MARKDOWN'
# Changelog

## [Unreleased]

## [1.10.0] - 2026-12-24

### Added

- What is new.

### Fixed

- What was wrong ([how](docs/network.md)).

## [1.1.0] - 2026-11-01

- The one before.

[1.1.0]: https://example.org/compare
MARKDOWN
    [[ $(notes 1.10.0) == $'### Added\n\n- What is new.\n\n### Fixed\n\n- What was wrong ([how](docs/network.md)).' ]]
    [[ $(notes 1.1.0) == '- The one before.' ]]
}

notes_of_a_version_without_a_section_are_refused() {
    printf '# Changelog\n\n## [Unreleased]\n\n- Things.\n\n## [1.1.0] - 2026-11-01\n\n## [1.0.0] - 2026-10-01\n\n- The first.\n' >"$work/tree/CHANGELOG.md"
    local version
    # Not there, there and empty, the beginning of another.
    for version in 2.0.0 1.1.0 1.1 1; do
        ! notes "$version" || { echo "$version has notes"; return 1; }
    done
}

# folder NAME: the same files each time, made in another order and with other modes and times.
folder() {
    local name
    mkdir -p "$work/$1/release/bin"
    for name in "${@:2}"; do printf '%s' "$name" >"$work/$1/release/bin/$name"; done
    chmod 0700 "$work/$1/release/bin/run"
}

digest() { sha256sum <"$1"; }

an_archive_is_the_same_whoever_packs_it() {
    export SOURCE_DATE_EPOCH=1764547200
    (umask 022; folder one a b run; TZ=UTC pack "$work/one/release" "$work/one.tar.gz")
    (umask 077; folder two run b a; touch -d 2001-01-01 "$work/two/release/bin/a"; TZ=Asia/Tokyo pack "$work/two/release" "$work/two.tar.gz")
    [[ $(digest "$work/one.tar.gz") == $(digest "$work/two.tar.gz") ]]
    # And what is to be run can be.
    tar -tvzf "$work/one.tar.gz" | grep -q '^-rwxr-xr-x 0/0 .*release/bin/run$'
}

an_archive_has_other_bytes_for_other_files() {
    export SOURCE_DATE_EPOCH=1764547200
    folder three a b run
    pack "$work/three/release" "$work/three.tar.gz"
    chmod a-x "$work/three/release/bin/run"
    pack "$work/three/release" "$work/other.tar.gz"
    [[ $(digest "$work/three.tar.gz") != $(digest "$work/other.tar.gz") ]]
}

# bill CRATE DEPENDENCY: as cargo-cyclonedx writes it, in short.
bill() {
    jq -n --arg ref "path+file://$copy/$1#0.1.0" --arg name "$1" --arg other "$2" '{
        metadata: {timestamp: "2026-12-01T00:00:00Z", tools: [{name: "cargo-cyclonedx"}], component: {"bom-ref": $ref, name: $name}},
        components: [{"bom-ref": $other, name: $other}, {"bom-ref": "serde", name: "serde"}],
        dependencies: [{ref: $ref, dependsOn: [$other, "serde"]}, {ref: "serde"}]}' >"$work/$1.cdx.json"
}

bills_become_one() {
    local copy=$work/copy
    mkdir -p "$work/stage/bundle/tools"
    echo criu >"$work/stage/bundle/tools/criu"
    bill podferry tokio
    bill podferry-agent nix
    merge 0.1.0 "$(debian "$work/stage")" "$work/podferry.cdx.json" "$work/podferry-agent.cdx.json" >"$work/merged"
    jq -e '[.components[]."bom-ref"] == ["nix", "path+file:///podferry/podferry#0.1.0", "path+file:///podferry/podferry-agent#0.1.0", "serde", "tokio", "file:bundle/tools/criu"]
        and (.dependencies[] | select(.ref == "podferry").dependsOn | length == 3)
        and ([.dependencies[].dependsOn[]] - [.components[]."bom-ref"] == [])' "$work/merged" >/dev/null || { cat "$work/merged"; return 1; }
    ! grep -F "$work" "$work/merged"
}

run() {
    local status=0
    copy_tree
    # Not in a condition, where `set -e` would not hold inside it.
    set +e
    (set -e; "$1") >"$work/output" 2>&1
    status=$?
    set -e
    if [[ $status -eq 0 ]]; then
        passed=$((passed + 1))
        printf 'ok      %s\n' "${1//_/ }"
    else
        printf 'FAILED  %s\n' "${1//_/ }"
        sed 's/^/        /' "$work/output"
    fi
}

main_test() {
    local name
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    for name in "${CASES[@]}"; do run "$name"; done
    printf '{"cases": %d, "passed": %d}\n' "${#CASES[@]}" "$passed"
    [[ $passed -eq ${#CASES[@]} ]]
}

main_test
