# `make test` is what CI runs. Every step prints its time.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

CARGO ?= cargo
CACHE ?= $(HOME)/.cache/kvfabric
PYTHON ?= python3
PREFIX ?= /usr/local
VENV := $(CACHE)/venv
S3_SERVER := $(CACHE)/s3s/bin/s3s-fs
STEP = @scripts/step

.PHONY: help setup fmt check test test-rust test-c test-python test-engines test-rdma test-sanitize test-long demo bench-build bench bench-fabric bench-index bench-engines static wheel install

help: ## What can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: ## Install what the tests need and is missing
	@CACHE='$(CACHE)' PYTHON='$(PYTHON)' scripts/setup

fmt: ## Format the code
	$(CARGO) fmt --all

check: setup ## Formatting, lints, licences, the PTX beside its source, documentation
	$(STEP) "format" $(CARGO) fmt --all --check
	$(STEP) "clippy" $(CARGO) clippy --workspace --all-targets --all-features -- -D warnings
	$(STEP) "cargo-deny" scripts/deny
	$(STEP) "CUDA kernels" env CACHE='$(CACHE)' '$(PYTHON)' scripts/cuda-kernels --check
	$(STEP) "documentation" env RUSTDOCFLAGS='-D warnings' $(CARGO) doc --workspace --no-deps --exclude kvfabric-python

test: setup check test-rust test-c test-python test-rdma test-engines ## Everything CI runs

test-rust: setup ## Unit, property, conformance, simulation and integration tests
	$(STEP) "build the programs" $(CARGO) build --bins
	$(STEP) "rust tests" env KVFABRIC_PYTHON='$(VENV)/bin/python' KVFABRIC_S3_SERVER='$(S3_SERVER)' $(CARGO) test --workspace --exclude kvfabric-python
	$(STEP) "a newer UCX" env CACHE='$(CACHE)' VENV='$(VENV)' scripts/test-ucx
	$(STEP) "cuFile" env CACHE='$(CACHE)' VENV='$(VENV)' scripts/test-cufile

test-sanitize: ## The tests of `transfer`, the node and the C ABI under AddressSanitizer; builds all it needs anew
	$(STEP) "AddressSanitizer" scripts/sanitize

test-c: setup ## The C programs, built with the system's compiler
	$(STEP) "C ABI" ffi/c/tests/run

test-python: setup ## The Python package, installed into a virtual environment
	$(STEP) "Python package" env VENV='$(VENV)' ffi/python/tests/run

test-engines: setup ## A real vLLM on the Python package; the first run makes an environment of 3 GB in CACHE
	$(STEP) "engines" env CACHE='$(CACHE)' PYTHON='$(PYTHON)' scripts/engines
	$(STEP) "tests with engines" env CACHE='$(CACHE)' ffi/python/tests/engines/run

test-rdma: ## RDMA by soft-RoCE in a virtual machine: conformance over verbs and UCX, how paths end, kv-bench, a demo
	$(STEP) "RDMA" env CACHE='$(CACHE)' CARGO='$(CARGO)' scripts/test-rdma

test-long: ## The simulation over many seeds, property tests with many cases, an hour of churn for the indexer
	$(STEP) "simulation, many seeds" env KVFABRIC_SEEDS=2000 $(CARGO) test --release -p kvfabric-sim
	$(STEP) "an hour of churn" env KVFABRIC_SOAK_SECONDS=3600 $(CARGO) test --release -p kvfabric-indexer --test soak
	$(STEP) "properties, many cases" env PROPTEST_CASES=20000 $(CARGO) test --release -p kvcache-core -p kvfabric-indexer

demo: ## A small cluster on this machine
	$(CARGO) run --release --bin kvfabric -- demo

bench-build:
	$(CARGO) build --release --bin kv-bench --bin kvfabric
	mkdir -p target/bench

bench: bench-build ## Every figure of docs/benchmarks.md, beside its reference
	scripts/bench

bench-fabric: setup bench-build ## Transfers beside memcpy, raw TCP, raw UCX, plain disk calls, NIXL and Mooncake
	CACHE='$(CACHE)' PYTHON='$(PYTHON)' scripts/bench-fabric

bench-engines: setup ## Calls from C and Python, idle processes, a prompt from one real vLLM to another, beside NIXL
	CACHE='$(CACHE)' PYTHON='$(PYTHON)' scripts/bench-engines

bench-index: bench-build ## Ingestion, lookups and memory of the index, beside other indexes
	-$(CARGO) build --release --manifest-path benches/compare/Cargo.toml --target-dir target/compare
	target/release/kv-bench index --grpc --json target/bench/index.json

install: ## Put the C library into PREFIX (/usr/local), below DESTDIR if that is set
	PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' CARGO='$(CARGO)' ffi/c/install

static: ## Build kv-bench as one file that needs no library
	CACHE='$(CACHE)' PYTHON='$(PYTHON)' CARGO='$(CARGO)' scripts/static

wheel: ## Build the Python wheel, for every Linux with glibc 2.28 or later, and check that it is one
	CACHE='$(CACHE)' PYTHON='$(PYTHON)' scripts/wheel
