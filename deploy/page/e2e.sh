#!/usr/bin/env bash
# Clicks through the coordinator's page in headless Chromium. Installs the browser by apt where there is none. Started by
# `make e2e-page` under run.sh.
set -euo pipefail
# shellcheck source=deploy/setup/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../setup/lib.sh"
# shellcheck source=deploy/page/browser.sh
. "$(dirname "${BASH_SOURCE[0]}")/browser.sh"

need_browser
exec cargo test --locked -p podferry-coordinator --test page -- --ignored
