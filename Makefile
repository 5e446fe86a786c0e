# Everything a developer or CI runs. `make demo` and `make test` do all their
# own set-up on a fresh Debian or Ubuntu machine with Go.

GO        ?= go
BIN       := bin/lazyvol
# The S3 server of the tests and the TCP proxy that makes its network fail, each
# built once from the Go module proxy.
VERSITYGW := github.com/versity/versitygw/cmd/versitygw@v1.8.0
TOXIPROXY := github.com/Shopify/toxiproxy/v2/cmd/server@v2.5.0
TOOLS     := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/lazyvol-tools
FUZZTIME  ?= 20s

export LAZYVOL_VERSITYGW ?= $(TOOLS)/versitygw
export LAZYVOL_TOXIPROXY ?= $(TOOLS)/toxiproxy-server
export LAZYVOL_DEBIAN_ROOT ?= $(TOOLS)/debian-root.tar

.PHONY: build dist demo test unit race integration stress fuzz bench bench-table bench-parts lint setup tools clean

build:
	CGO_ENABLED=0 $(GO) build -trimpath -o $(BIN) ./cmd/lazyvol

# Static binaries, archives and Debian packages, in dist/.
dist:
	scripts/dist

# Debian packages the tests and the demo need; nothing is done if they are there.
setup:
	@scripts/setup

tools: $(LAZYVOL_VERSITYGW) $(LAZYVOL_TOXIPROXY) $(LAZYVOL_DEBIAN_ROOT)
	@scripts/vm-image $(TOOLS) >/dev/null

$(LAZYVOL_VERSITYGW):
	@echo "building versitygw, the S3 server of the tests (once, 4 minutes)"
	GOBIN=$(dir $@) $(GO) install $(VERSITYGW)

$(LAZYVOL_TOXIPROXY):
	GOBIN=$@.build $(GO) install $(TOXIPROXY)
	mv $@.build/server $@
	rmdir $@.build

# A Debian with nothing but what the package needs, to install it on.
$(LAZYVOL_DEBIAN_ROOT):
	mmdebstrap --quiet --variant=apt --include=fuse3 bookworm $(@D)/unfinished.tar
	mv $(@D)/unfinished.tar $@

demo: setup build
	@scripts/demo $(abspath $(BIN))

# What CI runs: lint, the layering test and every package with the race
# detector, then the built binary end to end.
test: setup tools lint race integration

# The tests of schedules explore thousands of interleavings, one after the other
# and in one goroutine at a time: the race detector would find nothing in them
# and slows them down ten times.
SCHEDULES := Schedules|EachRule

race:
	$(GO) test -race -skip '$(SCHEDULES)' $$($(GO) list ./... | grep -v /integration)
	$(GO) test -run '$(SCHEDULES)' ./snapshot ./volume

integration: build
	$(GO) test -count=1 -timeout 15m ./integration/...

# Longer than CI has time for. Tells how many kills were survived.
stress: build tools
	@scripts/stress ./integration/... ./volume/...

fuzz:
	@scripts/fuzz $(FUZZTIME)

# What docs/performance.md shows. BENCH are flags of integration/bench, such as
# BENCH='-quick -rounds 1' or BENCH='-run warm'.
bench: bench-table bench-parts

# lazyvol beside the raw file and whichever peers are installed, in a mount
# namespace of its own: a copy of a mount in somebody else's keeps it alive.
bench-table: setup build tools
	@scripts/bench-setup $(TOOLS)
	$(GO) build -o bin/bench ./integration/bench
	unshare --mount bin/bench -lazyvol $(BIN) -tools $(TOOLS) -json bin/bench.json $(BENCH)

# The parts by themselves: codec, compression, map look-up, seal, commit.
bench-parts:
	$(GO) test -run '^$$' -bench . -benchmem $$($(GO) list ./... | grep -v /integration)

lint:
	$(GO) vet ./...
	$(GO) tool staticcheck ./...
	@unformatted=$$(gofmt -l $$(git ls-files '*.go')); test -z "$$unformatted" || { echo "gofmt would change: $$unformatted"; exit 1; }

clean:
	rm -rf bin dist
