#!/usr/bin/env bash
# coordinator.sh [CASE...]: the coordinator's tests that need an API server, against a test cluster of their own, which is taken away afterwards. Only
# those whose names have CASE in them, where some are given; PODFERRY_CLUSTER is the cluster's name.
set -euo pipefail
# shellcheck source=deploy/setup/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../setup/lib.sh"

NAME=${PODFERRY_CLUSTER:-coordinator-tests}
TESTCLUSTER=$PODFERRY_ROOT/.podferry/testcluster/bin/testcluster

[[ -x $TESTCLUSTER ]] || die "no $TESTCLUSTER: run make testcluster"
cd "$PODFERRY_ROOT"
cargo test --workspace --test kubernetes --no-run
trap '"$TESTCLUSTER" --name "$NAME" down' EXIT
"$TESTCLUSTER" --name "$NAME" up
KUBECONFIG=$("$TESTCLUSTER" --name "$NAME" kubeconfig)
PODFERRY_TESTCLUSTER="$TESTCLUSTER --name $NAME"
export KUBECONFIG PODFERRY_TESTCLUSTER
cargo test --workspace --test kubernetes -- --ignored --test-threads=1 "$@"
