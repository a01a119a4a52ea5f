#!/usr/bin/env bash
# What CHANGELOG.md says of a version, as the text of its release.
#
#   notes.sh VERSION
set -euo pipefail
# shellcheck source=deploy/setup/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../setup/lib.sh"

# section VERSION: the lines between its heading and the next one, or the links at the end.
section() {
    awk -v heading="## [$1]" '
        index($0, "## ") == 1 || /^\[[^]]*\]: / { if (inside) exit }
        inside { print }
        index($0, heading) == 1 { inside = 1 }' "$PODFERRY_ROOT/CHANGELOG.md"
}

main() {
    local notes
    [[ $# -eq 1 ]] || die 'usage: notes.sh VERSION'
    # A substitution takes the empty lines at the end away, this those at the beginning.
    notes=$(section "$1" | sed '/./,$!d')
    [[ -n $notes ]] ||
        die "CHANGELOG.md says nothing of $1: give what is under 'Unreleased' the heading '## [$1] - YYYY-MM-DD', and put an empty 'Unreleased' above it"
    printf '%s\n' "$notes"
}

main "$@"
