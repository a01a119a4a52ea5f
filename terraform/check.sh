#!/usr/bin/env bash
# Checks the Terraform modules without a cloud and without a provider: formatting, real `terraform validate` and `terraform test` against the providers'
# schemas (check/schema.js says where those are from), checkov's policies, and that a wrong argument would be found. The last line is JSON.
#
#   check.sh            all of it
#   check.sh --faults   only that what is wrong is found
#   check.sh --write    formats, and writes the tables of the modules' README.md anew
set -euo pipefail
# shellcheck source=deploy/setup/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../deploy/setup/lib.sh"

readonly CHECK=$PODFERRY_ROOT/terraform/check
readonly CACHE=$PODFERRY_STATE/cache/terraform
readonly ROOTS=(modules/chart modules/gke modules/eks modules/gke/examples/shopping-cart modules/eks/examples/shopping-cart)
readonly MODULES=3

# made FOLDER FILE...: whether the folder was made from just these files; else it is to be made anew.
made() { [[ -f $1/.made-from && $(cat "$1/.made-from") == "$(cat "${@:2}" | sha256sum)" ]]; }
note_made() { cat "${@:2}" | sha256sum >"$1/.made-from"; }

require_tools() {
    local tool
    for tool in terraform node npm go python3; do
        command -v "$tool" >/dev/null || die "$tool is missing: install it (Terraform 1.9, Node.js 20, Go 1.25, Python 3.10 or newer)"
    done
}

# The providers' prebuilt CDKTF packages, for the schemas in them.
ensure_packages() {
    made "$CACHE/node" "$CHECK/package-lock.json" && return 0
    log "gets the providers' schemas"
    rm -rf "$CACHE/node"
    mkdir -p "$CACHE/node"
    cp "$CHECK/package.json" "$CHECK/package-lock.json" "$CHECK/.npmrc" "$CACHE/node/"
    (cd "$CACHE/node" && npm ci --no-audit --no-fund >&2)
    note_made "$CACHE/node" "$CHECK/package-lock.json"
}

ensure_checkov() {
    made "$CACHE/checkov" "$CHECK/requirements.txt" && return 0
    log "installs checkov"
    rm -rf "$CACHE/checkov"
    python3 -m venv "$CACHE/checkov"
    "$CACHE/checkov/bin/pip" install --quiet --requirement "$CHECK/requirements.txt" >&2
    note_made "$CACHE/checkov" "$CHECK/requirements.txt"
}

# What stands in for the providers, with nothing but their schemas, where Terraform looks for them.
make_mirror() {
    local provider types at address version
    (cd "$CHECK/provider" && go build -o "$work/provider" .)
    "$CACHE/checkov/bin/python" "$CHECK/kinds.py" "$PODFERRY_ROOT/terraform/modules" >"$work/types"
    for provider in aws google helm; do
        mapfile -t types < <(awk -v want="$provider" '$1 == want {print $2}' "$work/types")
        read -r address version < <(NODE_PATH=$CACHE/node/node_modules node "$CHECK/schema.js" \
            "$CACHE/node/node_modules/@cdktf/provider-$provider" "$work/mirror" "${types[@]}")
        at=$work/mirror/$address/$version
        mkdir -p "$at/$platform"
        mv "$at/schema.json" "$at/$platform/"
        cp "$work/provider" "$at/$platform/terraform-provider-${provider}_v$version"
    done
    printf 'provider_installation {\n  filesystem_mirror {\n    path = "%s"\n  }\n}\n' "$work/mirror" >"$work/terraformrc"
    export TF_CLI_CONFIG_FILE=$work/terraformrc CHECKPOINT_DISABLE=1
}

# A copy, since Terraform writes beside what it reads. copy NAME
copy() {
    mkdir -p "$work/$1/deploy/helm"
    cp -r "$PODFERRY_ROOT/terraform" "$work/$1/"
    cp -rL "$PODFERRY_ROOT/deploy/helm/podferry" "$work/$1/deploy/helm/"
}

# Of one root: the errors, one a line. diagnose FOLDER
diagnose() {
    if ! terraform -chdir="$1" init -backend=false -input=false -no-color >"$work/init" 2>&1; then
        sed 's/^/init: /' "$work/init"
        return 0
    fi
    terraform -chdir="$1" validate -json 2>&1 | python3 -c '
import json, sys
for each in json.load(sys.stdin)["diagnostics"]:
    at = each.get("range") or {}
    print(each["summary"], "|", at.get("filename", ""), at.get("start", {}).get("line", ""), "|", each["detail"].replace("\n", " "))'
}

check_format() {
    terraform fmt -check -recursive -diff "$PODFERRY_ROOT/terraform" >&2
}

# The tables of inputs and outputs.
check_documents() { "$CACHE/checkov/bin/python" "$CHECK/documents.py" "$PODFERRY_ROOT/terraform/modules"; }

check_arguments() {
    local root
    for root in "${ROOTS[@]}"; do
        log "validates $root"
        diagnose "$work/tree/terraform/$root" >"$work/found"
        sed "s#^#$root: #" "$work/found" >&2
        unknown=$((unknown + $(wc -l <"$work/found")))
    done
    [[ $unknown -eq 0 ]]
}

check_tests() {
    local root status=0
    for root in modules/chart modules/gke modules/eks; do
        log "tests $root"
        terraform -chdir="$work/tree/terraform/$root" test -no-color >&2 || status=1
    done
    return "$status"
}

# Whatever is excepted has its reason beside it, as "checkov:skip=ID: reason".
check_policies() {
    "$CACHE/checkov/bin/checkov" --directory "$PODFERRY_ROOT/terraform/modules" --framework terraform --skip-download --compact --output json \
        >"$work/policies" 2>"$work/policies.log" || true
    failures=$(python3 - "$work/policies" <<'PY'
import json, sys
report = json.load(open(sys.argv[1]))
if not isinstance(report, dict) or not report.get("summary", {}).get("passed"):
    sys.exit("checkov checked nothing")
for each in report["results"]["failed_checks"]:
    print(each["check_id"], each["resource"], each["file_path"], each["check_name"], file=sys.stderr)
for each in report["results"]["skipped_checks"]:
    if len(each["check_result"].get("suppress_comment", "")) < 20:
        sys.exit(f"{each['check_id']} of {each['resource']} is skipped without a reason")
print(report["summary"]["failed"] + report["summary"]["parsing_errors"])
PY
) || { cat "$work/policies.log" >&2; failures=1; }
    [[ $failures -eq 0 ]]
}

# fault WHAT FILE OLD NEW ROOT WANTED: with NEW in place of OLD in FILE, validating ROOT says WANTED.
fault() {
    local what=$1 file=$2 old=$3 new=$4 root=$5 wanted=$6
    rm -rf "$work/fault"
    copy fault
    grep -qF -- "$old" "$work/fault/terraform/$file" || die "the fault '$what' has nothing to change in $file"
    sed -i "0,/$old/s//$new/" "$work/fault/terraform/$file"
    diagnose "$work/fault/terraform/$root" >"$work/found"
    if grep -q "^$wanted" "$work/found"; then
        log "found: $what"
    else
        log "not found: $what; wanted '$wanted', have:"
        cat "$work/found" >&2
        return 1
    fi
}

check_faults() {
    local gke=modules/gke eks=modules/eks status=0
    fault 'a misspelt argument' "$eks/main.tf" capacity_type capacity_kind "$eks" 'Unsupported argument' || status=1
    fault 'a misspelt argument in a nested block' "$gke/main.tf" enable_private_nodes enable_private_node "$gke" 'Unsupported argument' || status=1
    fault 'a misspelt block' "$gke/main.tf" 'private_cluster_config {' 'private_cluster_conf {' "$gke" 'Unsupported block type' || status=1
    fault 'a misspelt resource type' "$eks/network.tf" '"aws_vpc"' '"aws_vpcs"' "$eks" 'Invalid resource type' || status=1
    fault 'a misspelt data source' "$eks/iam.tf" '"aws_partition"' '"aws_partitions"' "$eks" 'Invalid data source' || status=1
    fault 'a misspelt variable of a module' "$gke/main.tf" '  image_repository = ' '  image_repo = ' "$gke" 'Unsupported argument' || status=1
    fault 'a missing argument' "$eks/main.tf" 'node_role_arn   = aws_iam_role.nodes.arn' '' "$eks" 'Missing required argument' || status=1
    fault 'a missing block' "$eks/main.tf" 'scaling_config {' 'timeouts {' "$eks" 'Insufficient scaling_config blocks' || status=1
    fault 'a misspelt computed attribute' "$eks/outputs.tf" 'this.endpoint' 'this.end_point' "$eks" 'Unsupported attribute' || status=1
    fault 'a value of the wrong type' "$gke/main.tf" 'auto_repair  = true' 'auto_repair  = "maybe"' "$gke" 'Incorrect attribute value type' || status=1
    fault 'an argument of helm_release' modules/chart/main.tf create_namespace make_namespace modules/chart 'Unsupported argument' || status=1
    return "$status"
}

main() {
    local check failed=() unknown=0 failures=0 checks=(check_format check_documents check_arguments check_tests check_policies check_faults)
    [[ ${1:-} != --faults ]] || checks=(check_faults)
    require_tools
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    platform=$(go env GOOS)_$(go env GOARCH)
    mkdir -p "$CACHE"
    ensure_packages
    ensure_checkov
    if [[ ${1:-} == --write ]]; then
        terraform fmt -recursive "$PODFERRY_ROOT/terraform" >&2
        "$CACHE/checkov/bin/python" "$CHECK/documents.py" "$PODFERRY_ROOT/terraform/modules" --write
    fi
    make_mirror
    copy tree
    for check in "${checks[@]}"; do
        log "$check"
        "$check" || failed+=("$check")
    done
    [[ ${#failed[@]} -eq 0 ]] || log "failed: ${failed[*]}"
    printf '{"modules": %d, "unknown_arguments": %d, "policy_failures": %d}\n' "$MODULES" "$unknown" "$failures"
    [[ ${#failed[@]} -eq 0 ]]
}

main "$@"
