#!/usr/bin/env bash
# Boots kernels with soft-dirty marks under emulation and tests on them what this machine's kernel may lack. Ends with one
# line of JSON. Started by `make e2e-vm` under run.sh.
#
#   e2e.sh [STEP...]    STEP is one of those in `steps` below; all, unless some are named
set -euo pipefail
# shellcheck source=deploy/vm/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# Linux 6.12 has soft-dirty marks and userfaultfd, 6.1 the marks alone.
readonly ALL_STEPS=(memory-trixie memory-bookworm migrate-trixie)
# For one machine's tests. They take a minute or two where nothing else runs.
readonly MACHINE_SECONDS=${PODFERRY_VM_SECONDS:-900}
# For the test with two machines, whose own deadlines together are shorter.
readonly MIGRATE_SECONDS=2400

# Tests have this path in them.
readonly BUILT=${CARGO_TARGET_DIR:-$PODFERRY_ROOT/target}

memory_programs=()
migrate_program=
scratch=
machine=
summary=
clean_up() {
    # `timeout` hands it on to the machine.
    [[ -z $machine ]] || kill "$machine" 2>/dev/null || true
    [[ -z $scratch ]] || rm -rf "$scratch"
    # It ended before its end: the reason stands above.
    [[ -n $summary ]] || summary="{\"ok\": false, \"seconds\": $SECONDS, \"steps\": []}"
    printf '%s\n' "$summary"
}

# build_tests CARGO-TEST-ARGUMENT...: prints the paths of the test programs.
build_tests() {
    cargo test --locked --no-run --message-format=json "$@" </dev/null |
        sed -nE 's#.*"profile":\{[^}]*"test":true\}.*"executable":"([^"]+)".*#\1#p'
}

# run_machine SUITE FOLDER: boots it on a folder, shows its console, and fails unless the folder's `run` ended with 0.
run_machine() {
    local suite=$1 folder=$2 console=$2.console status=0 viewer
    : >"$console"
    timeout --foreground "$MACHINE_SECONDS" "$VM_FILES/machine.sh" boot "$suite" "$folder" >"$console" 2>&1 &
    machine=$!
    tail -n +1 -f --pid="$machine" "$console" >&2 &
    viewer=$!
    wait "$machine" || status=$?
    machine=
    wait "$viewer" || true
    rm -f "$folder.img"
    [[ $status -ne 124 ]] || log "error: the machine was not done after $MACHINE_SECONDS s"
    # The console ends lines with a carriage return.
    tr -d '\r' <"$console" | grep -qx 'podferry-guest: ended with 0'
}

# The memory engine's tests on a kernel, with those that need soft-dirty marks. What follows SUITE chooses among them.
test_memory() {
    local suite=$1 folder=$scratch/memory-$1 program
    shift
    mkdir -p "$folder/built/debug"
    printf 'built %s\n' "$BUILT" >"$folder/mounts"
    {
        printf '#!/bin/bash\nuname -a\nmkdir -p %q\nstatus=0\n' "$BUILT/tmp"
        for program in "${memory_programs[@]}"; do
            printf '%q --include-ignored --test-threads=1 %s || status=1\n' "/payload/${program##*/}" "$*"
        done
        echo "exit \$status"
    } >"$folder/run"
    chmod 0755 "$folder/run"
    install -m 0755 "${memory_programs[@]}" "$folder"
    install -m 0755 "$BUILT/debug/podferry-memory-churn" "$folder/built/debug"
    run_machine "$suite" "$folder"
}

# Two machines: the test starts them itself, shows their consoles when it fails, and ends by its own deadlines.
test_migrate() {
    PODFERRY_VM_SUITE=$1 timeout "$MIGRATE_SECONDS" "$migrate_program" --ignored --nocapture >&2 </dev/null
}

run_step() {
    case $1 in
    # Guard regions came with 6.13.
    memory-trixie) test_memory trixie --skip guard_pages_hold_nothing ;;
    # What has `soft_dirty` in its name: the rest needs Linux 6.7.
    memory-bookworm) test_memory bookworm soft_dirty the_choice_of_a_tracker_is_told the_tracker_that_is_asked_for ;;
    migrate-trixie) test_migrate trixie ;;
    *) die "there is no step $1: ${ALL_STEPS[*]}" ;;
    esac
}

main() {
    require_root
    cd "$PODFERRY_ROOT"
    local steps=("$@") step since ok verdict=true entries=()
    [[ ${#steps[@]} -gt 0 ]] || steps=("${ALL_STEPS[@]}")
    scratch=$(mktemp -d)
    trap clean_up EXIT
    trap 'exit 130' INT TERM
    for step in "${steps[@]}"; do
        "$VM_FILES/machine.sh" make "${step#*-}" </dev/null
    done
    # The tests start the real programs.
    cargo build --locked --lib --bins -p podferry-agent -p podferry-coordinator -p podferry -p podferry-runtime \
        -p podferry-local -p podferry-memory -p podferry-criu-shim -p podferry-tar </dev/null
    mapfile -t memory_programs < <(build_tests -p podferry-memory)
    migrate_program=$(build_tests -p podferry-local --test vm)
    [[ ${#memory_programs[@]} -eq 2 && -x $migrate_program ]] || die "the test programs were not built: ${memory_programs[*]} $migrate_program"
    for step in "${steps[@]}"; do
        log "$step"
        since=$SECONDS
        ok=true
        run_step "$step" || {
            ok=false
            verdict=false
        }
        entries+=("{\"step\": \"$step\", \"ok\": $ok, \"seconds\": $((SECONDS - since))}")
    done
    summary="{\"ok\": $verdict, \"seconds\": $SECONDS, \"steps\": [$(IFS=, && echo "${entries[*]}")]}"
    [[ $verdict == true ]]
}

main "$@"
