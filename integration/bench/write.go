package main

import "context"

func writeRows() []row {
	one := job{rw: "randwrite", block: "4k", depth: 1}
	deep := job{rw: "randwrite", block: "4k", depth: 16}
	synced := job{rw: "randwrite", block: "4k", depth: 1, fsync: true}
	sequential := job{rw: "write", block: "1m", depth: 4}
	var best []key
	for _, peer := range peers {
		best = append(best, of(peer, iops))
	}
	return []row{
		{"write-random", "4 KiB random writes, O_DIRECT, QD1", fleetFio(one, iops), []bar{
			{text: "≥ 1.0 × the best peer", unit: iops, got: of(lazyvolName, iops), refs: best, factor: 1},
		}},
		{"write-random-16", "4 KiB random writes, O_DIRECT, QD16", fleetFio(deep, iops), []bar{
			{text: "≥ 1.0 × the best peer", unit: iops, got: of(lazyvolName, iops), refs: best, factor: 1},
		}},
		{"write-fsync", "4 KiB random writes with fsync each", fleetFio(synced, iops), []bar{
			{text: "≥ 1.0 × qemu's FUSE export of a local file", unit: iops, got: of(lazyvolName, iops), refs: []key{of(qemuFileName, iops)}, factor: 1},
			{text: "aim: 0.5 × the raw file", unit: iops, got: of(lazyvolName, iops), refs: []key{of(rawName, iops)}, factor: 0.5},
		}},
		{"write-sequential", "sequential writes 1 MiB, O_DIRECT", fleetFio(sequential, rate), []bar{
			{text: "≥ 0.9 × the raw file", unit: rate, got: of(lazyvolName, rate), refs: []key{of(rawName, rate)}, factor: 0.9},
		}},
	}
}

func coldWriteRows() []row {
	return []row{{"write-cold", "4 KiB random writes, QD16, nothing cached", writeCold, []bar{
		{text: "≥ 0.9 × the warm ones", unit: iops, got: of(lazyvolName, iops), refs: []key{of(warmName, iops)}, factor: 0.9},
		{text: "no GETs", unit: requests, got: of(lazyvolName, requests), fixed: 0, less: true, factor: 1},
	}}}
}

// warmName is lazyvol with everything cached, where the row is about it without.
const warmName = "lazyvol, warm"

// writeCold writes to a volume of which nothing is cached, and to one that is
// hydrated, both without a write layer to begin with.
func writeCold(ctx context.Context, r *turn) error {
	warm, err := r.volume(ctx)
	if err != nil {
		return err
	}
	if err := warm.hydrated(ctx); err != nil {
		return err
	}
	cold, err := r.volume(ctx, "--no-hydrate")
	if err != nil {
		return err
	}
	j := job{rw: "randwrite", block: "4k", depth: 16}
	passed := r.server.tap.watch()
	found, err := r.fio(ctx, cold.image, j)
	if err != nil {
		return err
	}
	r.record(lazyvolName, requests, float64(len(passed.traffic().of("GET", "/data/").requests)))
	r.record(lazyvolName, iops, found.iops)
	if found, err = r.fio(ctx, warm.image, j); err != nil {
		return err
	}
	r.record(warmName, iops, found.iops)
	return nil
}
