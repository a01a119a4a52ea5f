#!/usr/bin/env bash
# Looks at the report in headless Chromium: sizes of screens, light and dark, keyboard, print. Installs the browser by apt where there is none.
# Started by `make e2e-report` under run.sh. PODFERRY_RESULTS names a results folder to be looked at instead of made-up results, and
# PODFERRY_SCREENSHOTS a folder for pictures.
set -euo pipefail
# shellcheck source=deploy/setup/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../deploy/setup/lib.sh"
# shellcheck source=deploy/page/browser.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../deploy/page/browser.sh"

need_browser
exec cargo test --locked -p podferry-report --test page -- --ignored
