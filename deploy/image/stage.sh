#!/usr/bin/env bash
# Builds podferry's programs so that they run on any node, whatever its C library, and lays out what goes into the image.
#
#   stage.sh OUT
#
# OUT/bundle is what the installer puts onto nodes; OUT/bin has the programs that run in the image itself. Programs are
# linked statically (the gnu target with crt-static: no other target than the host's is needed). The library that is preloaded into CRIU
# cannot be; it runs with the C library in CRIU's bundle, which is Debian sid's, so at least as new as the one it is linked with.
set -euo pipefail
# shellcheck source=deploy/setup/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../setup/lib.sh"

readonly ON_NODES=(podferry-agent podferry-dump-worker podferry-pager podferry-hook podferry-stdio-keeper podferry-tar podferry-runtime
    podferry-install)
readonly IN_IMAGE=(podferry podferry-coordinator podferry-install podferry-nodes)

# Static and dynamic ones are in folders of their own: the flags differ, so each build would undo the other's. deploy/release/build.sh has further flags.
build() {
    local triple
    triple=$(uname -m)-unknown-linux-gnu
    cd "$PODFERRY_ROOT"
    RUSTFLAGS="${RUSTFLAGS:-} -C target-feature=+crt-static" cargo build --locked --release --target "$triple" --target-dir "$target" \
        -p podferry-agent -p podferry-runtime -p podferry-tar -p podferry-coordinator -p podferry -p podferry-install -p podferry-nodes \
        --bins >&2
    cargo build --locked --release --target-dir "$target/shim" -p podferry-criu-shim >&2
    static=$target/$triple/release
    shim=$target/shim/release/libpodferry_criu_shim.so
}

is_static() { ! patchelf --print-interpreter "$1" >/dev/null 2>&1; }

# install_programs FOLDER NAME...
install_programs() {
    local folder=$1 name
    shift
    mkdir -p "$folder"
    for name in "$@"; do
        [[ -x $static/$name ]] || die "there is no $static/$name: the workspace has no program of that name"
        is_static "$static/$name" || die "$static/$name is not static: it would not run on nodes with an older C library"
        install -m 0755 "$static/$name" "$folder/$name"
        strip --strip-debug "$folder/$name"
    done
}

main() {
    [[ $# -eq 1 ]] || die "usage: stage.sh OUT"
    local out=$1 static shim target=${PODFERRY_IMAGE_TARGET:-${CARGO_TARGET_DIR:-$PODFERRY_ROOT/target}/image/static}
    [[ -f $TOOLS_DIR/libexec/criu ]] ||
        die "$TOOLS_DIR has no CRIU bundle (this host's own CRIU is new enough?): the image needs one that takes its libraries along"
    build
    rm -rf "$out"
    install_programs "$out/bin" "${IN_IMAGE[@]}"
    install_programs "$out/bundle/bin" "${ON_NODES[@]}"
    install -m 0755 "$shim" "$out/bundle/bin/"
    strip --strip-debug "$out/bundle/bin/${shim##*/}"
    mkdir -p "$out/bundle/tools/lib" "$out/bundle/tools/libexec"
    cp -a "$TOOLS_DIR/lib/criu" "$out/bundle/tools/lib/"
    cp -a "$TOOLS_DIR/libexec/criu" "$TOOLS_DIR/libexec/busybox" "$out/bundle/tools/libexec/"
    sed -nE '/^\[workspace.package\]/,/^$/s/^version = "(.*)"$/\1/p' "$PODFERRY_ROOT/Cargo.toml" >"$out/bundle/VERSION"
    cp "$PODFERRY_ROOT/LICENSE" "$out/"
    log "$out: $(du -sh "$out" | cut -f 1)"
}

main "$@"
