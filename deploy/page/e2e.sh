#!/usr/bin/env bash
# Clicks through the coordinator's page in headless Chromium. Installs the browser by apt where there is none. Started by
# `make e2e-page` under run.sh.
set -euo pipefail
# shellcheck source=deploy/setup/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../setup/lib.sh"

has_browser() {
    local program
    for program in chromium-headless-shell chromium chromium-browser; do
        command -v "$program" >/dev/null && return
    done
    return 1
}

if ! has_browser; then
    log "installing headless Chromium"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium-headless-shell >/dev/null ||
        die "there is no package chromium-headless-shell here: install Chromium"
fi
exec cargo test --locked -p podferry-coordinator --test page -- --ignored
