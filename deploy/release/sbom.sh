#!/usr/bin/env bash
# The software bill of materials of what is released, as CycloneDX 1.5 in JSON: every crate that Cargo.lock brings into one of the programs, and the
# files that come from Debian. The same commit gives the same bytes.
#
#   sbom.sh FOLDER [STAGE]    writes FOLDER/podferry-VERSION-linux-ARCH.cdx.json; STAGE is what deploy/image/stage.sh has laid out, for Debian's files
#   sbom.sh --install         only gets cargo-cyclonedx ready
set -euo pipefail
# shellcheck source=deploy/setup/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../setup/lib.sh"
# shellcheck source=deploy/release/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

readonly CYCLONEDX_VERSION=0.5.9
readonly CYCLONEDX=$PODFERRY_STATE/cargo/bin/cargo-cyclonedx
# Those whose programs or library deploy/image/stage.sh lays out.
readonly SHIPPED=(podferry podferry-agent podferry-coordinator podferry-criu-shim podferry-install podferry-nodes podferry-runtime podferry-tar)

# cargo-cyclonedx from crates.io, as deploy/setup/lint.sh builds cargo-deny: for a short build, in a folder of its own.
install_cyclonedx() {
    cargo install --list --root "$PODFERRY_STATE/cargo" 2>/dev/null | grep -qx "cargo-cyclonedx v$CYCLONEDX_VERSION:" && return
    log "building cargo-cyclonedx $CYCLONEDX_VERSION"
    # Flags of a release are not for tools.
    env -u RUSTFLAGS -u CFLAGS -u CXXFLAGS CARGO_TARGET_DIR="$PODFERRY_STATE/cargo/build" CARGO_PROFILE_RELEASE_OPT_LEVEL=1 \
        CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 CARGO_PROFILE_RELEASE_DEBUG=0 \
        cargo install --quiet --locked --root "$PODFERRY_STATE/cargo" --version "$CYCLONEDX_VERSION" --force cargo-cyclonedx </dev/null
    rm -rf "$PODFERRY_STATE/cargo/build"
}

# One that builds at a time: lint.sh builds there, too.
ensure_cyclonedx() {
    mkdir -p "$PODFERRY_STATE/cargo"
    exec 8>"$PODFERRY_STATE/cargo/lock"
    flock -w 900 8 || die "another build of a tool holds $PODFERRY_STATE/cargo/lock for 15 minutes"
    install_cyclonedx 8>&-
    exec 8>&-
}

# crates COPY: one bill for each member of the workspace, beside its Cargo.toml. The tool writes into the tree, so it gets a copy.
crates() {
    git -C "$PODFERRY_ROOT" archive HEAD | tar -x -C "$1"
    cd "$1"
    # The tool would write Cargo.lock anew where it is old.
    cargo metadata --locked --format-version 1 >/dev/null || die 'Cargo.lock does not fit Cargo.toml: run cargo check and commit it'
    SOURCE_DATE_EPOCH=$(commit_time) "$CYCLONEDX" cyclonedx --quiet --format json --spec-version 1.5 --all --target "$(uname -m)-unknown-linux-gnu"
}

# bills COPY: the files of what is shipped. A crate may be called otherwise than its folder.
bills() {
    local crate found
    for crate in "${SHIPPED[@]}"; do
        found=$(find "$1" -name "$crate.cdx.json" -type f)
        [[ -n $found ]] || die "cargo-cyclonedx made no $crate.cdx.json: is the crate still called so?"
        printf '%s\n' "$found"
    done
}

# debian STAGE: the files that are not built here, with their sums, as CycloneDX's components.
debian() {
    [[ -n $1 ]] || { echo '[]'; return; }
    (cd "$1" && find bundle/tools -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum --) | jq -R -s '
        split("\n") | map(select(length > 0) | split("  ") | {
            type: "file", "bom-ref": ("file:" + .[1]), name: .[1], hashes: [{alg: "SHA-256", content: .[0]}], supplier: {name: "Debian"}})'
}

# merge VERSION DEBIAN BILL...: one bill of many. The first that names a component says what it is; what they depend on is put together. References have the
# copy's folder in them, which becomes /podferry.
merge() {
    local version=$1 files=$2
    shift 2
    jq -S -s --arg version "$version" --argjson files "$files" --arg folder "file://$copy" '
        def once(key): group_by(key) | map(.[0]);
        . as $bills
        | {
            bomFormat: "CycloneDX", specVersion: "1.5", version: 1,
            metadata: {
                timestamp: $bills[0].metadata.timestamp, tools: $bills[0].metadata.tools,
                component: {type: "application", "bom-ref": "podferry", name: "podferry", version: $version, licenses: [{expression: "Apache-2.0"}]}
            },
            components: (([$bills[] | .metadata.component, .components[]?] | once(."bom-ref")) + $files),
            dependencies: (
                [$bills[].dependencies[]?] | group_by(.ref) | map({ref: .[0].ref, dependsOn: ([.[].dependsOn[]?] | unique)})
                + [{ref: "podferry", dependsOn: ([$bills[].metadata.component."bom-ref", $files[]."bom-ref"] | unique)}])
        }
        | walk(if type == "string" then split($folder) | join("file:///podferry") else . end)' "$@"
}

main() {
    local copy version out files found made
    [[ $# -ge 1 ]] || die 'usage: sbom.sh FOLDER [STAGE] | --install'
    command -v jq >/dev/null || die 'jq is missing: apt-get install jq'
    ensure_cyclonedx
    [[ $1 != --install ]] || return 0
    version=$("$PODFERRY_ROOT/deploy/release/versions.sh")
    out=$(realpath "$1")/podferry-$version-linux-$(uname -m).cdx.json
    files=$(debian "${2:-}")
    copy=$(mktemp -d)
    # shellcheck disable=SC2064 # the path of now is meant
    trap "rm -rf '$copy'" EXIT
    (crates "$copy") >&2
    found=$(bills "$copy")
    mapfile -t made <<<"$found"
    merge "$version" "$files" "${made[@]}" >"$out"
    log "$out: $(jq '.components | length' "$out") components"
}

# test.sh looks at single functions.
[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
