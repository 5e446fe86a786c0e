package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/aws/aws-sdk-go-v2/credentials"

	"github.com/lazyvol/lazyvol/blockstore"
)

// The stages of a snapshot, each by itself on all cores.
const (
	readStage   = "read alone"
	hashStage   = "SHA-256 alone"
	lz4Stage    = "lz4 alone"
	uploadStage = "upload alone"
	slowest     = "slowest stage"
)

func snapshotRows() []row {
	full := func(metric string) []key { return []key{{"snapshot-create", lazyvolName, metric}} }
	return []row{
		{"snapshot-create", "snapshot create of the image", snapshotCreate, []bar{{
			text: "≥ 0.6 × the slowest stage alone, or both cores busy", unit: rate, got: of(lazyvolName, rate), refs: []key{of(slowest, rate)}, factor: 0.6,
			or: of(lazyvolName, allCores), orLeast: everyCore, orText: "cores busy",
		}}},
		{"snapshot-increment", "incremental snapshot, 1 % of blocks changed", snapshotIncrement, []bar{
			{text: "≤ 3 % of the full one's bytes", unit: "MB", got: of(lazyvolName, "MB"), refs: full("MB"), less: true, factor: 0.03},
			{text: "≤ packs + 12 requests", unit: requests, got: of(lazyvolName, requests), fixed: 12, less: true, factor: 1, plus: 1, plusRef: of(lazyvolName, "packs")},
			{text: "≤ 5 % of its time + 10 round trips", unit: ms, got: of(lazyvolName, ms), refs: full(ms), less: true, factor: 0.05, plus: 10, plusRef: of(bareName, rtt)},
			{text: "the cut stops writers ≤ 10 ms", unit: ms, got: of(lazyvolName, cutTime), fixed: 10, less: true, factor: 1},
		}},
	}
}

func snapshotCreate(ctx context.Context, r *turn) error {
	if err := r.recordStages(ctx); err != nil {
		return err
	}
	h, err := r.farHost()
	if err != nil {
		return err
	}
	passed := r.server.tap.watch()
	cpu, err := r.startMeter(0)
	if err != nil {
		return err
	}
	_, used, err := h.runMeasured(ctx, "snapshot", "create", r.image.path)
	if err != nil {
		return err
	}
	_, all, err := cpu.stop()
	if err != nil {
		return err
	}
	seen := passed.traffic()
	r.record(lazyvolName, ms, milliseconds(used.wall))
	r.record(lazyvolName, rate, mbs(r.stored.dataBytes(), used.wall))
	r.record(lazyvolName, "MB", float64(seen.sent())/1e6)
	r.record(lazyvolName, requests, float64(len(seen.requests)))
	r.record(lazyvolName, "packs", float64(len(seen.of("PUT", "/packs/").requests)))
	r.record(lazyvolName, cores, used.cpu.Seconds()/used.wall.Seconds())
	r.record(lazyvolName, allCores, all+used.cpu.Seconds()/used.wall.Seconds())
	r.record(lazyvolName, "CPU s", used.cpu.Seconds())
	r.record(lazyvolName, "CPU s of server and proxy", all*used.wall.Seconds())
	r.note(seen.String())
	r.record(lazyvolName, memory, float64(used.peak)/mib)
	return nil
}

// recordStages measures each stage of a snapshot by itself, on all cores and in
// bytes of data blocks a second, so that they compare.
func (r *turn) recordStages(ctx context.Context) error {
	f, err := os.Open(r.image.path)
	if err != nil {
		return err
	}
	defer f.Close()
	content, err := unix.Mmap(int(f.Fd()), 0, int(r.image.size), unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return fmt.Errorf("map %s: %w", r.image.path, err)
	}
	defer func() { _ = unix.Munmap(content) }() // it was mapped
	block := func(i int) []byte {
		off := r.stored.blocks[i] * int64(r.stored.size)
		return content[off:min(off+int64(r.stored.size), r.image.size)]
	}
	workers := runtime.GOMAXPROCS(0)
	scratch := make(chan []byte, workers)
	compressors := make(chan *blockstore.Compressor, workers)
	for range workers {
		scratch <- make([]byte, r.stored.size)
		compressors <- new(blockstore.Compressor)
	}
	stages := []struct {
		name string
		do   func(i int) error
	}{
		{readStage, func(i int) error {
			p := <-scratch
			defer func() { scratch <- p }()
			_, err := f.ReadAt(p[:len(block(i))], r.stored.blocks[i]*int64(r.stored.size))
			return err
		}},
		{hashStage, func(i int) error { _ = sha256.Sum256(block(i)); return nil }},
		{lz4Stage, func(i int) error {
			p, c := <-scratch, <-compressors
			defer func() { scratch <- p; compressors <- c }()
			c.Compress(p, block(i))
			return nil
		}},
	}
	var rates []float64
	for _, stage := range stages {
		begin := time.Now()
		if err := inParallel(workers, len(r.stored.blocks), stage.do); err != nil {
			return fmt.Errorf("%s: %w", stage.name, err)
		}
		rates = append(rates, mbs(r.stored.dataBytes(), time.Since(begin)))
		r.record(stage.name, rate, rates[len(rates)-1])
	}
	upload, err := r.uploadRate(ctx)
	if err != nil {
		return fmt.Errorf("%s: %w", uploadStage, err)
	}
	r.record(uploadStage, rate, upload)
	r.record(slowest, rate, slices.Min(append(rates, upload)))
	return nil
}

// uploadRate puts the packs of the image into the store, and nothing else.
func (r *turn) uploadRate(ctx context.Context) (best float64, err error) {
	store, err := blockstore.NewS3(ctx, blockstore.S3Config{
		Bucket: storeBucket, Prefix: "stage", Region: "us-east-1", Endpoint: r.server.far,
		Credentials: credentials.NewStaticCredentialsProvider(r.server.accessKey, r.server.secretKey, ""),
	})
	if err != nil {
		return 0, err
	}
	packs := make([][]byte, len(r.stored.packs))
	for i, p := range r.stored.packs {
		if packs[i], err = os.ReadFile(filepath.Join(r.server.folder(storePrefix), p.key)); err != nil {
			return 0, err
		}
	}
	for _, parallel := range []int{4, 8, 16} {
		begin := time.Now()
		err := inParallel(parallel, len(packs), func(i int) error {
			_, err := store.Put(ctx, fmt.Sprintf("%d/%d/%d", r.number, parallel, i), packs[i], blockstore.IfAbsent)
			return err
		})
		if err != nil {
			return 0, err
		}
		best = max(best, mbs(r.stored.dataBytes(), time.Since(begin)))
	}
	return best, nil
}

// snapshotIncrement changes a page of every hundredth block of a volume and
// takes a snapshot, twice: once it is timed, and once somebody writes meanwhile.
func snapshotIncrement(ctx context.Context, r *turn) (err error) {
	if err := r.recordRoundTrip(ctx); err != nil {
		return err
	}
	m, err := r.volume(ctx)
	if err != nil {
		return err
	}
	if err := m.hydrated(ctx); err != nil {
		return err
	}
	f, err := openPager(m.image, os.O_RDWR)
	if err != nil {
		return err
	}
	defer f.close(&err)
	pages := r.stored.pages(11)
	pages = pages[:max(len(pages)/100, 1)]
	for _, timed := range []bool{true, false} {
		for i, page := range pages {
			copy(f.page, fmt.Sprintf("round %d, timed %t, change %d", r.number, timed, i))
			if _, err := f.write(page); err != nil {
				return err
			}
		}
		if !timed {
			return r.snapshotUnderWrites(ctx, m, f, pages)
		}
		if err := r.timedIncrement(ctx, m); err != nil {
			return err
		}
	}
	return nil
}

func (r *turn) timedIncrement(ctx context.Context, m *lvMount) error {
	passed := r.server.tap.watch()
	_, used, err := m.host.runMeasured(ctx, "snapshot", "create", m.id)
	if err != nil {
		return err
	}
	seen := passed.traffic()
	r.record(lazyvolName, ms, milliseconds(used.wall))
	r.record(lazyvolName, "MB", float64(seen.sent())/1e6)
	r.record(lazyvolName, requests, float64(len(seen.requests)))
	r.record(lazyvolName, roundTrips, float64(seen.roundTrips()))
	r.note(seen.String())
	r.record(lazyvolName, "packs", float64(len(seen.of("PUT", "/packs/").requests)))
	return nil
}

// cutTime is the metric of how long the cut of a snapshot stopped writers.
const cutTime = "cut ms"

// cut returns for how long the last snapshot of a volume stopped writers, in
// milliseconds, as the daemon logged it.
func (m *lvMount) cut() (float64, error) {
	log := filepath.Join(m.host.dir, "state", "volumes", m.id, "daemon.log")
	data, err := os.ReadFile(log)
	if err != nil {
		return 0, err
	}
	cuts := regexp.MustCompile(`msg="snapshot cut".* stopped_ms=(\S+)`).FindAllSubmatch(data, -1)
	if len(cuts) == 0 {
		return 0, fmt.Errorf("%s tells of no cut", log)
	}
	return strconv.ParseFloat(string(cuts[len(cuts)-1][1]), 64)
}

// snapshotUnderWrites takes a snapshot while pages are written all the time,
// and as long a time without snapshot before: what a write takes there, on a
// machine that is busy otherwise, the cut is not to blame for.
func (r *turn) snapshotUnderWrites(ctx context.Context, m *lvMount, f *pager, pages []int64) error {
	const before = time.Second
	slowestUntil := func(done func() bool) (time.Duration, error) {
		most := time.Duration(0)
		for i := 0; !done(); i++ {
			took, err := f.write(pages[i%len(pages)])
			if err != nil {
				return 0, err
			}
			most = max(most, took)
			time.Sleep(100 * time.Microsecond)
		}
		return most, nil
	}
	end := time.Now().Add(before)
	quiet, err := slowestUntil(func() bool { return time.Now().After(end) })
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() {
		_, err := m.host.run(ctx, "snapshot", "create", m.id)
		ended <- err
	}()
	var created error
	during, err := slowestUntil(func() bool {
		select {
		case created = <-ended:
			return true
		default:
			return false
		}
	})
	if err != nil {
		return errors.Join(err, <-ended)
	}
	if created != nil {
		return created
	}
	stopped, err := m.cut()
	if err != nil {
		return err
	}
	r.record(lazyvolName, cutTime, stopped)
	r.record(lazyvolName, "slowest write without snapshot ms", milliseconds(quiet))
	r.record(lazyvolName, "slowest write ms", milliseconds(during))
	return nil
}
