#!/usr/bin/env bash
# run.sh COMMAND [ARGUMENT...]: runs COMMAND with the project's CRIU and runc first on PATH, and in PODFERRY_TOOLS
# the folder that has them in bin and busybox in libexec.
set -euo pipefail
# shellcheck source=deploy/setup/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

[[ $# -gt 0 ]] || die "usage: run.sh COMMAND [ARGUMENT...]"
[[ -x $TOOLS_DIR/bin/criu ]] || die "no CRIU in $TOOLS_DIR: run deploy/setup/setup.sh"
PATH=$TOOLS_DIR/bin:$(host_path)
PODFERRY_TOOLS=$TOOLS_DIR
export PATH PODFERRY_TOOLS
exec "$@"
