# Headless Chromium for tests; to be sourced behind deploy/setup/lib.sh.
# shellcheck shell=bash

has_browser() {
    local program
    for program in chromium-headless-shell chromium chromium-browser; do
        command -v "$program" >/dev/null && return
    done
    return 1
}

# Installs it by apt where there is none.
need_browser() {
    has_browser && return
    log "installing headless Chromium"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium-headless-shell >/dev/null ||
        die "there is no package chromium-headless-shell here: install Chromium"
}
