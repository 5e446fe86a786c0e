package main

import (
	"context"
	"fmt"
)

// setUpFleet starts every system and reads all of each, which is the row
// "cold-sequential". From then on everything is cached.
func setUpFleet(ctx context.Context, r *turn) error {
	r.row = "cold-sequential"
	if err := r.recordCeiling(ctx); err != nil {
		return err
	}
	for _, s := range r.systems {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		m, err := r.cold(ctx, s)
		if err == nil {
			err = r.sequential(ctx, m, 0)
		}
		if err != nil {
			r.recordFailure(s, err)
			continue
		}
		r.fleet = append(r.fleet, m)
	}
	return nil
}

func warmRows() []row {
	random := job{rw: "randread", block: "4k", depth: 1, warm: true}
	deep := job{rw: "randread", block: "4k", depth: 16, warm: true}
	pageCached := job{rw: "randread", block: "4k", cached: true, warm: true}
	through := job{rw: "read", block: "1m", cached: true, once: true, warm: true, drop: true}
	again := job{rw: "read", block: "1m", cached: true, once: true, warm: true}
	direct := job{rw: "read", block: "1m", depth: 4, warm: true}
	return []row{
		{"cold-sequential", "cold sequential through the mount, buffered", func(context.Context, *turn) error { return nil }, sequentialBars()},
		{"warm-random", "warm 4 KiB O_DIRECT, QD1", fleetFio(random, iops), []bar{
			{text: "≥ 1.0 × qemu's FUSE export of a local file", unit: iops, got: of(lazyvolName, iops), refs: []key{of(qemuFileName, iops)}, factor: 1},
		}},
		{"warm-random-16", "warm 4 KiB O_DIRECT, QD16", fleetFio(deep, iops), []bar{
			{text: "≥ 0.9 × qemu's FUSE export of a local file", unit: iops, got: of(lazyvolName, iops), refs: []key{of(qemuFileName, iops)}, factor: 0.9},
		}},
		{"warm-page-cached", "warm 4 KiB, page-cached", fleetFio(pageCached, iops), []bar{
			{text: "≥ 0.6 × the raw file", unit: iops, got: of(lazyvolName, iops), refs: []key{of(rawName, iops)}, factor: 0.6},
		}},
		{"warm-sequential", "warm sequential 1 MiB, buffered, through FUSE", fleetFio(through, rate), []bar{
			{text: "≥ 0.7 × the cached raw file", unit: rate, got: of(lazyvolName, rate), refs: []key{{"warm-sequential-again", rawName, rate}}, factor: 0.7},
		}},
		{"warm-sequential-again", "warm sequential 1 MiB, buffered, read before", fleetFio(again, rate), []bar{
			{text: "≥ 0.7 × the cached raw file", unit: rate, got: of(lazyvolName, rate), refs: []key{of(rawName, rate)}, factor: 0.7},
		}},
		{"warm-sequential-direct", "warm sequential 1 MiB, O_DIRECT", fleetFio(direct, rate), []bar{
			{text: "≥ 1.0 × qemu's FUSE export of a local file", unit: rate, got: of(lazyvolName, rate), refs: []key{of(qemuFileName, rate)}, factor: 1},
		}},
	}
}

// fleetFio runs a job on each system.
func fleetFio(j job, metric string) func(context.Context, *turn) error {
	return func(ctx context.Context, r *turn) error {
		if len(r.fleet) == 0 {
			return fmt.Errorf("no system runs")
		}
		for _, m := range r.fleet {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			r.recordFailure(m.system, r.memberFio(ctx, m, j, metric))
		}
		return nil
	}
}

func (r *turn) memberFio(ctx context.Context, m member, j job, metric string) error {
	if j.warm {
		if err := readAll(ctx, m.path, !j.cached || j.drop); err != nil {
			return err
		}
	}
	var cpu meter
	if m.mount != nil {
		if err := m.mount.forgetMemory(); err != nil {
			return err
		}
		var err error
		if cpu, err = r.startMeter(m.pid()); err != nil {
			return err
		}
	}
	found, err := r.fio(ctx, m.path, j)
	if err != nil {
		return err
	}
	value := found.iops
	if metric == rate {
		value = found.mbs
	}
	r.record(m.system.name(), metric, value)
	if m.mount == nil {
		return nil
	}
	if err := r.recordCores(cpu); err != nil {
		return err
	}
	return r.recordMemory(r.row, m.mount)
}
