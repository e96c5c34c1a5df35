# Needs Go and git. What else a target needs it gets by itself (.ci/need).
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

GO      ?= go
BIN     := $(CURDIR)/bin
TOOLS   := $(BIN)/tools
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
COMMIT  ?= $(shell git describe --always --abbrev=40 --exclude '*' --dirty 2>/dev/null || echo unknown)
PKG     := github.com/imagewolf/imagewolf/internal/build
LDFLAGS := -s -w -X $(PKG).version=$(VERSION) -X $(PKG).commit=$(COMMIT)
BUILD   := CGO_ENABLED=0 $(GO) build -buildvcs=false -ldflags '$(LDFLAGS)'

# The same for all that is built here, so that what several programs have in
# common is compiled once.
export GOFLAGS += -trimpath

# How long each fuzz target runs in fuzz-smoke: inputs (1000x) or time (30s).
export FUZZTIME ?= 1000x
# More for 'go test', such as TESTFLAGS='-run TestDropIn -v'.
TESTFLAGS ?=

.PHONY: help
help: ## say what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  %-18s %s\n", $$1, $$2}'

.PHONY: build
build: ## build bin/imagewolf and bin/imagewolf-notifier, static
	$(BUILD) -o $(BIN)/ ./cmd/imagewolf ./cmd/imagewolf-notifier

.PHONY: cross
cross: ## build for linux/amd64, linux/arm64 and linux/arm/v7
	for program in imagewolf imagewolf-notifier; do \
		GOOS=linux GOARCH=amd64 $(BUILD) -o $(BIN)/cross/$$program-linux-amd64 ./cmd/$$program; \
		GOOS=linux GOARCH=arm64 $(BUILD) -o $(BIN)/cross/$$program-linux-arm64 ./cmd/$$program; \
		GOOS=linux GOARCH=arm GOARM=7 $(BUILD) -o $(BIN)/cross/$$program-linux-armv7 ./cmd/$$program; \
	done

.PHONY: test
test: test-unit test-integration ## run every test; as root

# The race detector needs cgo. The tags keep what the torrent library would then
# use in C and C++ out, as it is out of the product: the tests test the same code,
# and no C++ compiler is needed.
PURE := nosqlite,disable_libutp

.PHONY: test-unit
test-unit: ## run the unit tests with the race detector
	@.ci/need gcc igzip
	CGO_ENABLED=1 $(GO) test -race -tags $(PURE) -timeout 10m $(TESTFLAGS) ./...

.PHONY: test-integration
test-integration: build containerds ## run the tests against real containerd 2.4.2 and 1.7.35; as root
	@.ci/need ip runc nft mkfs.ext4 docker-registry
	@[ "$$(id -u)" = 0 ] || { echo "the integration tests mount snapshots: run them as root" >&2; exit 1; }
	cd integration && CGO_ENABLED=0 $(GO) test -timeout 25m $(TESTFLAGS) ./...

# Figures go to the file that FAULTS_JSON names, also what there is of them when the
# tests end early.
.PHONY: faults
faults: export FAULTS = all
faults: override export FAULTS_JSON := $(if $(FAULTS_JSON),$(abspath $(FAULTS_JSON)))
faults: build containerds ## let everything fail that can, the slow ones too; as root, FAULTS_JSON= SOAK= ...
	@.ci/need ip runc nft mkfs.ext4 docker-registry
	cd integration && CGO_ENABLED=0 $(GO) test -count 1 -timeout 3h -run '$(FAULT_TESTS)' $(TESTFLAGS) .
FAULT_TESTS := Faults|Liars|Strangers|KeyIsExchanged|CertificatesAreExchanged|DiskIsFull|DiskFull|PowerLoss|SocketIsHeld|RestartInAPull|NamesGone|Soak
FAULT_TESTS := $(FAULT_TESTS)|FetcherKilled|DaemonRestarted|RegistryFails|ConnectionCut|WrongBytes|TrackerKilled|ClusterGone

.PHONY: fuzz-smoke
fuzz-smoke: ## run every fuzz target for FUZZTIME (1000 inputs)
	.ci/fuzz

# Go keeps what fuzzing finds in its build cache, for one machine; this keeps the best
# of it for all, to be committed. FUZZ='FuzzLoad$$' takes one target only.
.PHONY: fuzz-corpus
fuzz-corpus: FUZZTIME := $(if $(filter file,$(origin FUZZTIME)),30000x,$(FUZZTIME))
fuzz-corpus: ## fuzz for longer (FUZZTIME=30000x), and keep what was found in testdata/fuzz; FUZZ= KEEP=
	.ci/fuzz-corpus

.PHONY: demo
demo: build $(BIN)/containerd-2.4.2/containerd ## pull an image on four nodes at once on this machine; as root
	@[ "$$(id -u)" = 0 ] || { echo "the demo starts containerd: run it as root" >&2; exit 1; }
	@.ci/need ip runc
	cd integration && CGO_ENABLED=0 $(GO) build -o $(BIN)/imagewolf-demo ./cmd/imagewolf-demo
	$(BIN)/imagewolf demo

.PHONY: bench-binaries
bench-binaries: build $(BIN)/containerd-2.4.2/containerd
	@[ "$$(id -u)" = 0 ] || { echo "the benchmark makes network namespaces: run it as root" >&2; exit 1; }
	cd integration && CGO_ENABLED=0 $(GO) build -o $(BIN)/imagewolf-bench ./cmd/imagewolf-bench

# Variables and their defaults: docs/performance.md.
.PHONY: bench
bench: bench-binaries ## measure every scenario against containerd alone; as root, N= RATE= SCENARIOS= BENCH_JSON= ...
	COMMIT=$(COMMIT) $(BIN)/imagewolf-bench run

.PHONY: bench-smoke
bench-smoke: bench-binaries ## the same, small: fails if a pull fails or, cold or staggered, the registry sends more than one copy
	COMMIT=$(COMMIT) $(BIN)/imagewolf-bench smoke

.PHONY: bench-plot
bench-plot: bench-binaries ## measure 1 to 32 nodes and draw docs/bench.svg; as root, ten minutes
	COMMIT=$(COMMIT) $(BIN)/imagewolf-bench plot

.PHONY: containerds
containerds: $(BIN)/containerd-2.4.2/containerd $(BIN)/containerd-1.7.35/containerd $(BIN)/nerdctl-2.3.5/nerdctl ## build the containerds and the nerdctl that the tests drive

$(BIN)/containerd-2.4.2/containerd: integration/containerd2/go.mod integration/containerd2/go.sum
	cd integration/containerd2 && CGO_ENABLED=0 $(GO) build -ldflags '-s -w' -o $(@D)/ tool

$(BIN)/containerd-1.7.35/containerd: integration/containerd17/go.mod integration/containerd17/go.sum
	cd integration/containerd17 && CGO_ENABLED=0 $(GO) build -ldflags '-s -w' -o $(@D)/ tool

$(BIN)/nerdctl-2.3.5/nerdctl: integration/nerdctl/go.mod integration/nerdctl/go.sum
	cd integration/nerdctl && CGO_ENABLED=0 $(GO) build -ldflags '-s -w' -o $(@D)/ tool

.PHONY: lint
lint: $(TOOLS)/golangci-lint ## run the linters
	$(TOOLS)/golangci-lint run
	cd integration && $(TOOLS)/golangci-lint run --config ../.golangci.yml

$(TOOLS)/golangci-lint: tools/go.mod tools/go.sum
	cd tools && CGO_ENABLED=0 $(GO) build -o $(TOOLS)/ tool

.PHONY: generate
generate: ## write the generated files: protobuf and config.toml.example
	$(MAKE) --no-print-directory generate-into OUT=$(CURDIR)

# The version of protoc stands in a comment of its output; nothing else depends
# on it, so that comment may differ from machine to machine.
.PHONY: check-generated
check-generated: ## fail if a generated file is not what 'make generate' writes
	@rm -rf $(BIN)/.generated && mkdir -p $(BIN)/.generated
	@$(MAKE) --no-print-directory generate-into OUT=$(BIN)/.generated
	@cd $(BIN)/.generated && find . -type f | while read -r f; do \
		diff -u -I '^//.*protoc  *v' "$(CURDIR)/$$f" "$$f" || { echo "$$f is out of date: run 'make generate'" >&2; exit 1; }; done
	@rm -rf $(BIN)/.generated

.PHONY: generate-into
generate-into:
	@.ci/need protoc
	CGO_ENABLED=0 $(GO) build -o $(TOOLS)/ google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc
	PATH="$(TOOLS):$$PATH" protoc --go_out=$(OUT) --go_opt=paths=source_relative \
		--go-grpc_out=$(OUT) --go-grpc_opt=paths=source_relative api/v1/*.proto
	$(GO) run ./cmd/imagewolf config default >$(OUT)/config.toml.example.new
	mv $(OUT)/config.toml.example.new $(OUT)/config.toml.example

.PHONY: clean
clean: ## remove what was built
	rm -rf $(BIN)
