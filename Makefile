# Ambidex: two commands do everything on a fresh Debian machine, as root:
#   make bench   installs, builds, measures both captures side by side, says where the report is
#   make test    installs, builds, runs every test
# ARGS is passed on: make bench ARGS="--quick --out out/bench"

CARGO ?= cargo
ARGS ?= --quick
OUT ?= out/bench
PACKAGES = iproute2 iptables ipset nftables iperf3 wrk nginx-light conntrack tcpdump ethtool procps kmod curl jq make gcc bind9-dnsutils dnsmasq-base \
	user-mode-linux python3-jsonschema libipset-dev libmnl-dev libclang-dev clang \
	podman containerd runc containernetworking-plugins busybox-static \
	python3-prometheus-client python3-protobuf protobuf-compiler openssl nghttp2-client tshark \
	python3-grpcio python3-cryptography python3-h2 python3-yaml python3-pip mandoc redis-server redis-tools \
	postgresql-15 postgresql-client-15
# Building some C parts of dependencies needs no more than gcc; libipset-dev and clang are for the feature `libipset`.

.PHONY: all deps build release bench bench-full bench-all bench-geneve bench-cost test test-all test-geneve flows check clean-lab \
	kube-tools judges manifests image completions golden modes-doc experiment

all: build

deps:
	@missing=""; for p in $(PACKAGES); do dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ]; then echo "installing:$$missing"; apt-get update -qq && \
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; fi
	@# Not in the list: other packages of kubectl have the same file.
	@command -v kubectl >/dev/null || { echo "installing: kubernetes-client"; apt-get update -qq && \
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends kubernetes-client >/dev/null; }
	@command -v $(CARGO) >/dev/null || { echo "cargo is not on PATH: install Rust 1.95 or newer (rustup.rs)"; exit 1; }

build: deps
	$(CARGO) build --workspace

release: deps
	$(CARGO) build --release --bins

bench: release
	target/release/ambidex bench $(ARGS)

# Less than 20 minutes, with the relay.
bench-full: release
	target/release/ambidex bench --full --out out/bench-full

# Hours. What an earlier call measured is kept: interrupt it and call it again at will.
bench-all: release
	target/release/ambidex bench --all --resume --out out/bench-all

# In a User-Mode Linux machine, whose kernel has geneve: one processor, numbers that compare with each other only.
bench-geneve: release
	target/release/ambidex bench geneve

bench-cost: release
	target/release/ambidex bench cost

test: deps kube-tools judges
	tests/run --suite ci

test-all: deps kube-tools judges
	tests/run --suite all

test-geneve: deps
	$(CARGO) test --test geneve

# What becomes of every flow in every capture, as the document that says so: a run on this machine, with its commit.
flows: deps
	AMBIDEX_TEST_SUITE=all WRITE_FLOWS=$(CURDIR)/docs/flows.md $(CARGO) test --workspace --features kubernetes --test flow_matrix every_flow

# Live listings beside those of the articles (docs/decisions/0011-listings.md).
golden: deps
	$(CARGO) test --workspace --features kubernetes --test golden

# What is generated in docs/modes.md: listings and what one connection met, from labs on this machine.
modes-doc: deps
	WRITE_MODES=1 $(CARGO) test --workspace --features kubernetes --test modes_doc the_document

# A scripted migration under load (docs/experiments.md): make experiment SCENARIO=rolling-pods
SCENARIO ?= switch-1000
experiment: release
	target/release/ambidex experiment run $(SCENARIO) --check --out out/experiment/$(SCENARIO)

check: deps
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	$(CARGO) clippy --workspace --all-targets --features libipset,kubernetes -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --features kubernetes --no-deps --quiet

clean-lab: build
	target/debug/ambidex lab down --all

# helm and kubectl, for the tests of the manifests; without them these look at less and say so.
kube-tools: deps
	@deploy/fetch-kube-tools target/kube-tools || echo "helm and kubectl cannot be fetched: fewer tests of the manifests"

# promtool and a new libcurl, for the tests in which they judge.
judges: deps
	tests/judges/fetch target/judges

# What kustomize takes is what the chart makes.
manifests: kube-tools
	target/kube-tools/helm template ambidex deploy/helm/ambidex -n ambidex-system > deploy/kustomize/base/ambidex.yaml
	target/kube-tools/helm template ambidex deploy/helm/ambidex -n ambidex-system --set mode=mixed,teardown=true > deploy/kustomize/teardown/ambidex.yaml

# The plugin runs on the nodes, whatever C library they have: only its own last step is another one.
image: deps
	$(CARGO) build --release --features kubernetes --bin ambidex
	$(CARGO) rustc --release --features kubernetes --bin ambidex-cni -- -C target-feature=+crt-static
	deploy/image/build --binaries target/release --out out/image/ambidex.oci.tar

completions: build
	mkdir -p out/share
	for shell in bash zsh fish; do target/debug/ambidex completions $$shell > out/share/ambidex.$$shell || exit 1; done
	target/debug/ambidex man --out out/share/man/man1
