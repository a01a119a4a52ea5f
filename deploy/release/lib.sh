# shellcheck shell=bash
# What building a release shares with comparing two builds of it. To be sourced behind deploy/setup/lib.sh.

# Where a release is laid down.
# shellcheck disable=SC2034 # for those that source this
DIST=${PODFERRY_DIST:-${CARGO_TARGET_DIR:-$PODFERRY_ROOT/target}/dist}

# The time of the commit, in seconds since 1970: the only time that a release has in it.
commit_time() { git -C "$PODFERRY_ROOT" log -1 --format=%ct; }

# A release is that of a commit, so that anybody can build it again.
require_clean() {
    local changed
    changed=$(git -C "$PODFERRY_ROOT" status --porcelain --untracked-files=no) || die "$PODFERRY_ROOT is no clone: a release is built from a commit"
    [[ -z $changed ]] || die "there are changes that are not committed, so nobody could build this again: commit or stash them: $changed"
}

# build_environment FOLDER: sets what keeps this machine's folders, time, language and flags out of programs that are built into FOLDER. Paths in
# messages of panics and in debug information become /podferry, /cargo, /build and, as in Rust's own releases, /rustc/COMMIT.
build_environment() {
    local built=$1 sysroot commit pair
    sysroot=$(rustc --print sysroot)
    commit=$(rustc -vV | sed -n 's/^commit-hash: //p')
    RUSTFLAGS='' CFLAGS=''
    # The last that fits counts for rustc, and for GCC, too: the innermost folders are at the end.
    for pair in "$PODFERRY_ROOT=/podferry" "${CARGO_HOME:-$HOME/.cargo}=/cargo" "$sysroot/lib/rustlib/src/rust=/rustc/$commit" "$built=/build"; do
        RUSTFLAGS+=" --remap-path-prefix=$pair"
        CFLAGS+=" -ffile-prefix-map=$pair"
    done
    CXXFLAGS=$CFLAGS SOURCE_DATE_EPOCH=$(commit_time) CARGO_INCREMENTAL=0 LC_ALL=C TZ=UTC
    export RUSTFLAGS CFLAGS CXXFLAGS SOURCE_DATE_EPOCH CARGO_INCREMENTAL LC_ALL TZ
    # Each would come before RUSTFLAGS, or into programs in another way.
    unset CARGO_ENCODED_RUSTFLAGS CARGO_BUILD_RUSTFLAGS CPPFLAGS LDFLAGS
}

# pack FOLDER ARCHIVE: the same bytes for the same files, whoever packs them, where and when. SOURCE_DATE_EPOCH is the time of all of them.
pack() {
    tar --create --directory "$(dirname "$1")" --format=ustar --sort=name \
        --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner --mode='u=rwX,go=rX' "$(basename "$1")" |
        gzip --no-name --best >"$2"
}

# sums FOLDER: the sums of the files in it, sorted by name.
sums() { (cd "$1" && find . -maxdepth 1 -type f ! -name SHA256SUMS -printf '%f\0' | LC_ALL=C sort -z | xargs -0 -r sha256sum --); }
