# Each target installs what it lacks (Debian or Ubuntu, as root), cleans up after itself, ends with a one-line summary and
# exits non-zero when what it checks does not hold.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

SETUP := deploy/setup/setup.sh
# Puts the project's CRIU and runc first on PATH, and cargo behind them.
RUN := deploy/setup/run.sh
# Told to cargo, too: its configuration may name another.
TARGET := $(or $(CARGO_TARGET_DIR),target)
RELEASE := $(TARGET)/release

.PHONY: help setup build demo test chaos soak local-up local-down bench-stream bench-warm bench-live bench-postcopy bench-hybrid bench-layers bench-loads \
	bench-slowdown bench-total bench-engine bench-scale experiments e2e-vm e2e-versions e2e-page \
	testcluster testcluster-up testcluster-down e2e-testcluster test-kubernetes e2e-kubernetes e2e-connections bench-pods image helm \
	e2e-install check-terraform release-check release lint

help:
	@echo 'make demo          the main job, start to end: two nodes, real workloads under load, migrations there and back'
	@echo 'make test          all tests, with real CRIU and runc'
	@echo 'make chaos         whatever fails in whatever phase of each strategy: one copy runs, nothing confirmed is lost, nothing is left'
	@echo 'make soak          500 migrations of a mixed set of workloads under load; agents and coordinator must not grow'
	@echo 'make e2e-vm        the soft-dirty tracker, and migrations between two kernels, in emulated machines that have both'
	@echo 'make e2e-versions  migrations between this version of the protocol and the one before, as in an upgrade'
	@echo 'make e2e-page      the page of the coordinator in headless Chromium'
	@echo 'make e2e-report    the report of experiments in headless Chromium'
	@echo 'make local-up      two nodes, a client side and a coordinator on this machine, to play with'
	@echo 'make local-down    takes them away again'
	@echo 'make testcluster-up, testcluster-down  a Kubernetes cluster of two nodes on this machine (builds Kubernetes once; needs Go)'
	@echo 'make e2e-testcluster  that cluster tested by itself'
	@echo 'make e2e-kubernetes  pods moved between the nodes of such a cluster, by every strategy, with everything killed on the way'
	@echo 'make e2e-connections  a thousand connections to a pod that moves three times, and what the way through the relay costs'
	@echo 'make bench-pods    how long pods of 250 and 1000 MiB stand still when they move between such nodes, and what their clients see'
	@echo 'make image         the image for Kubernetes, without Docker: target/image/podferry.tar (NAME=registry/podferry:tag)'
	@echo 'make helm          the chart and the kustomizations, checked without a cluster'
	@echo 'make e2e-install   the chart on a test cluster: install, a pod of the class, leave, uninstall; nothing must be left'
	@echo 'make check-terraform  the modules for GKE and EKS, checked without an account (needs Terraform, Node.js, Go, Python)'
	@echo 'make bench-stream  the transfer stream against raw TCP on the same link'
	@echo 'make bench-warm    warm migration of Redis at several sizes'
	@echo 'make bench-live    live migration of Redis at several sizes'
	@echo 'make bench-postcopy, bench-hybrid  the same with post-copy and hybrid'
	@echo 'make bench-layers  live migration of Redis with writable layers of several sizes'
	@echo 'make bench-loads   live migration of containers that are hard to move: which are refused, and why'
	@echo 'make bench-slowdown  throughput of Redis while its memory is copied, against that just before'
	@echo 'make bench-total   all of a live migration of idle memory against the page stream alone with the same bytes'
	@echo 'make bench-engine  live migration of one process against CRIU alone, at several sizes'
	@echo 'make experiments   what a migration costs, by workload, strategy, memory, dirty rate and link, beside other tools: at most an hour;'
	@echo '                   QUICK=1 at most 6 minutes; what is there already is not run again'
	@echo 'make bench-scale   a coordinator with 5,000 nodes and 1,000 migrations at once: CPU, memory, writes, time to drain'
	@echo 'make test-kubernetes  the coordinator against a real API server: objects, records, leaders'
	@echo 'make release-check  one version everywhere, and what the changelog says of it: what a tag needs'
	@echo 'make release       what is released, built from the commit that is checked out, in target/dist (ARGS="--registry ghcr.io/owner": image and chart, too)'
	@echo 'make lint          formatting, clippy, shellcheck, licences'

setup:
	@$(SETUP)

build: setup
	@$(RUN) cargo build --locked --release --target-dir $(TARGET) -p podferry-agent -p podferry-coordinator -p podferry \
		-p podferry-bench -p podferry-workloads -p podferry-runtime -p podferry-local \
		-p podferry-memory -p podferry-criu-shim -p podferry-tar -p podferry-engine-bench

demo: build
	@$(RUN) $(RELEASE)/podferry-bench demo

test: setup
	@$(RUN) deploy/setup/test.sh

# ARGS='--list', or ARGS='--only "live / fill" --repeat 3 --seed 7'; QUICK=1 for a few cases of each kind.
chaos: build
	@$(RUN) $(RELEASE)/podferry-bench chaos $(ARGS)

# ARGS='--migrations 1000'
soak: build
	@$(RUN) $(RELEASE)/podferry-bench soak $(ARGS)

local-up: build
	@$(RUN) $(RELEASE)/podferry-bench local up

local-down: build
	@$(RUN) $(RELEASE)/podferry-bench local down

bench-stream: build
	@$(RUN) $(RELEASE)/podferry-bench stream

bench-warm: build
	@$(RUN) $(RELEASE)/podferry-bench warm

bench-live: build
	@$(RUN) $(RELEASE)/podferry-bench live

bench-postcopy: build
	@$(RUN) $(RELEASE)/podferry-bench postcopy

bench-hybrid: build
	@$(RUN) $(RELEASE)/podferry-bench hybrid

bench-layers: build
	@$(RUN) $(RELEASE)/podferry-bench layers

bench-loads: build
	@$(RUN) $(RELEASE)/podferry-bench loads

bench-slowdown: build
	@$(RUN) $(RELEASE)/podferry-bench slowdown

# No containers and no namespaces: only the coordinator, and what stands in for agents.
bench-scale: setup
	@$(RUN) cargo build --locked --release --target-dir $(TARGET) -p podferry-coordinator --bins --examples
	@ulimit -n 65536; $(RUN) $(RELEASE)/examples/scale

bench-total: build
	@$(RUN) $(RELEASE)/podferry-bench total

bench-engine: build
	@$(RUN) $(RELEASE)/podferry-bench-engine

# ARGS='--plan' only shows what would be run; ARGS='--suite FILE --results FOLDER'.
experiments: build
	@$(RUN) $(RELEASE)/podferry-bench experiments $(ARGS)

e2e-vm: setup
	@$(RUN) deploy/vm/e2e.sh

e2e-versions: setup
	@$(RUN) deploy/versions/e2e.sh

e2e-page: setup
	@$(RUN) deploy/page/e2e.sh

.PHONY: e2e-report
e2e-report: setup
	@$(RUN) bench/report/e2e.sh

testcluster:
	@$(SETUP) --tools
	@deploy/testcluster/build.sh

testcluster-up: testcluster
	@.podferry/testcluster/bin/testcluster up $(TESTCLUSTER_UP)

testcluster-down:
	@[[ ! -x .podferry/testcluster/bin/testcluster ]] || .podferry/testcluster/bin/testcluster down

e2e-testcluster: testcluster
	@deploy/testcluster/e2e.sh

# The coordinator's Kubernetes side against the API server of a test cluster of its own; agents are stood in for.
test-kubernetes: setup testcluster
	@$(RUN) deploy/testcluster/coordinator.sh

# Pods moved in a cluster of its own.
e2e-kubernetes: setup testcluster
	@$(RUN) cargo build --workspace --lib --bins
	@$(RUN) deploy/kubernetes/e2e.sh

bench-pods: build testcluster
	@$(RUN) env PODFERRY_BINARIES=$(abspath $(RELEASE)) deploy/kubernetes/speed.sh $(ARGS)

e2e-connections: build testcluster
	@$(RUN) env PODFERRY_BINARIES=$(abspath $(RELEASE)) deploy/kubernetes/connections.sh $(ARGS)

image: setup
	@$(RUN) deploy/image/build.sh $(NAME)

helm:
	@deploy/helm/check.sh

e2e-install: testcluster image
	@$(RUN) deploy/helm/e2e.sh $(TARGET)/image/podferry.tar $(NAME)

check-terraform:
	@terraform/check.sh

release-check:
	@deploy/release/test.sh
	@deploy/release/notes.sh "$$(deploy/release/versions.sh)"

# Behind `umask 022`, so that files in the image can be read by all.
release: setup
	@umask 022; $(RUN) deploy/release/build.sh $(ARGS)

lint: setup
	@$(RUN) deploy/setup/lint.sh
