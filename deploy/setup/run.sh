#!/usr/bin/env bash
# run.sh COMMAND [ARGUMENT...]: runs COMMAND with the project's CRIU and runc first on PATH, and PODFERRY_TOOLS set.
set -euo pipefail
# shellcheck source=deploy/setup/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

[[ $# -gt 0 ]] || die "usage: run.sh COMMAND [ARGUMENT...]"
[[ -x $PODFERRY_TOOLS/bin/criu ]] || die "no CRIU in $PODFERRY_TOOLS: run deploy/setup/setup.sh"
PATH=$PODFERRY_TOOLS/bin:$(host_path)
export PATH
exec "$@"
