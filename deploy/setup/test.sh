#!/usr/bin/env bash
# Runs all tests of the workspace and sums them up: cargo's own lines, then one line of JSON. Exits non-zero when a test
# failed, did not compile, or none ran. Started by `make test` under run.sh.
#
#   test.sh [CARGO-TEST-ARGUMENT...]
set -euo pipefail
# shellcheck source=deploy/setup/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# Leaves the totals in passed, failed and ignored. A log without a result line leaves zeros.
sum_up() {
    read -r passed failed ignored < <(awk '
        # What a test printed may stand before it on the line.
        /test result: (ok|FAILED)\. / {
            for (i = 2; i <= NF; i++) {
                if ($i ~ /^passed;?$/) passed += $(i - 1)
                if ($i ~ /^failed;?$/) failed += $(i - 1)
                if ($i ~ /^ignored;?$/) ignored += $(i - 1)
            }
        }
        END { print passed + 0, failed + 0, ignored + 0 }' "$1")
}

# run_shown LOG COMMAND...: runs COMMAND, its output shown and kept in LOG; the status is COMMAND's. No pipe: a process that a
# broken test left behind would hold it open, and we would wait for ever.
run_shown() {
    local output=$1 status=0 viewer
    shift
    sleep 3h &
    running=$!
    tail -n +1 -f --pid="$running" "$output" &
    viewer=$!
    "$@" >"$output" 2>&1 </dev/null || status=$?
    # tail reads to the end once more after the process it watches is gone.
    stop_running
    wait "$viewer" || true
    return "$status"
}

running=
stop_running() {
    [[ -n $running ]] || return 0
    kill "$running" 2>/dev/null || true
    wait "$running" 2>/dev/null || true
    running=
}

# The kernel's counters of calls, which agents use where they are there: everywhere but in containers and machines without an init.
# The tests that need it say so themselves where the kernel has none.
mounted=
mount_tracefs() {
    mountpoint -q /sys/kernel/tracing && return
    if mount -t tracefs tracefs /sys/kernel/tracing; then mounted=/sys/kernel/tracing; fi
}

unmount_tracefs() {
    [[ -z $mounted ]] || umount "$mounted"
}

main() {
    local output status=0 seconds=$SECONDS passed failed ignored verdict=true
    require_root
    cd "$PODFERRY_ROOT"
    mount_tracefs
    output=$(mktemp)
    # shellcheck disable=SC2064 # the path of now is meant
    trap "stop_running; unmount_tracefs; rm -f '$output'" EXIT

    # End-to-end tests start the real binaries, and CRIU with the real library.
    cargo build --workspace --lib --bins --locked || status=$?
    if [[ $status -eq 0 ]]; then
        run_shown "$output" cargo test --workspace --locked --no-fail-fast "$@" || status=$?
    fi

    sum_up "$output"
    if [[ $status -ne 0 && $failed -eq 0 ]]; then
        log "error: the tests ended with status $status: they did not build, or a test binary died"
        failed=1
    fi
    if [[ $passed -eq 0 ]]; then
        log "error: no test ran"
        [[ $status -ne 0 ]] || status=1
    fi
    [[ $failed -eq 0 && $status -eq 0 ]] || verdict=false
    [[ $status -ne 0 || $failed -eq 0 ]] || status=1
    # For .ci/run, which ends with it.
    printf '%d passed, %d failed\n' "$passed" "$failed" >"$PODFERRY_STATE/test-totals"
    printf '{"ok": %s, "passed": %d, "failed": %d, "ignored": %d, "seconds": %d}\n' \
        "$verdict" "$passed" "$failed" "$ignored" "$((SECONDS - seconds))"
    return "$status"
}

main "$@"
