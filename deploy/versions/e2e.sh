#!/usr/bin/env bash
# Builds the last commit that spoke the protocol's previous version, and migrates between its programs and ours, as in the
# middle of an upgrade. Started by `make e2e-versions` under run.sh.
set -euo pipefail
# shellcheck source=deploy/setup/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../setup/lib.sh"

# Version 1. The next version's first commit names the one before itself here.
readonly PREVIOUS=3b476fca2e9d
readonly FOLDER=$PODFERRY_ROOT/.podferry/previous-$PREVIOUS

if [[ ! -x $FOLDER/target/debug/podferry-agent ]]; then
    git -C "$PODFERRY_ROOT" cat-file -e "$PREVIOUS^{commit}" 2>/dev/null ||
        die "this clone has no commit $PREVIOUS: fetch the whole history (git fetch --unshallow)"
    log "building the previous version ($PREVIOUS); takes some minutes"
    rm -rf "$FOLDER/source"
    mkdir -p "$FOLDER/source"
    git -C "$PODFERRY_ROOT" archive "$PREVIOUS" | tar -x -C "$FOLDER/source"
    (cd "$FOLDER/source" && cargo build --locked --workspace --bins --target-dir "$FOLDER/target")
fi
cargo build --locked --workspace --lib --bins
PODFERRY_PREVIOUS=$FOLDER/target/debug exec cargo test --locked -p podferry-local --test versions -- --ignored --test-threads 1
