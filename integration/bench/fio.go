package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A job is what fio does.
type job struct {
	rw      string // read, write, randread, randwrite
	block   string // as 4k
	depth   int    // requests at once
	cached  bool   // through the page cache
	fsync   bool   // after each write
	once    bool   // over the file once, not for a time
	warm    bool   // after all of the file was read once, just before
	drop    bool   // drop the file's pages before
	runtime time.Duration
}

// result is what fio found.
type result struct {
	iops, mbs float64
	p50, p99  time.Duration // of the completion of a request
	most      time.Duration
	requests  int64
}

// runtime is how long a job runs.
func (b *bench) runtime() time.Duration {
	if b.quick {
		return time.Second
	}
	return 5 * time.Second
}

// fio runs a job on a file or device.
func (b *bench) fio(ctx context.Context, path string, j job) (result, error) {
	engine, direct := "libaio", 1
	if j.cached {
		engine, direct = "psync", 0
	}
	args := []string{"--name=j", "--filename=" + path, "--rw=" + j.rw, "--bs=" + j.block, fmt.Sprintf("--iodepth=%d", max(j.depth, 1)),
		"--ioengine=" + engine, fmt.Sprintf("--direct=%d", direct), fmt.Sprintf("--size=%d", b.image.size),
		"--randrepeat=1", "--norandommap=1", "--allow_file_create=0", "--output-format=json"}
	if !j.once {
		runtime := j.runtime
		if runtime == 0 {
			runtime = b.runtime()
		}
		args = append(args, "--time_based=1", fmt.Sprintf("--runtime=%dms", runtime.Milliseconds()))
	}
	if j.fsync {
		args = append(args, "--fsync=1")
	}
	drop := 0
	if j.drop {
		drop = 1
	}
	// What the job before, of another system, has not written yet is not to be
	// written in the time of this one.
	unix.Sync()
	out, err := command(ctx, "fio", append(args, fmt.Sprintf("--invalidate=%d", drop))...)
	if err != nil {
		return result{}, err
	}
	return parseFio(out, strings.HasSuffix(j.rw, "write"))
}

func parseFio(out string, writes bool) (result, error) {
	type direction struct {
		IOPS     float64 `json:"iops"`
		Bytes    float64 `json:"bw_bytes"`
		Requests int64   `json:"total_ios"`
		Latency  struct {
			Max         float64            `json:"max"`
			Percentiles map[string]float64 `json:"percentile"`
		} `json:"clat_ns"`
	}
	var report struct {
		Jobs []struct {
			Error       int
			Read, Write direction
		}
	}
	start := strings.Index(out, "{") // warnings may come first
	if start < 0 {
		return result{}, fmt.Errorf("fio: %s", tail([]byte(out)))
	}
	if err := json.Unmarshal([]byte(out[start:]), &report); err != nil {
		return result{}, fmt.Errorf("fio: %w", err)
	}
	if len(report.Jobs) != 1 || report.Jobs[0].Error != 0 {
		return result{}, fmt.Errorf("fio: failed: %s", tail([]byte(out)))
	}
	d := report.Jobs[0].Read
	if writes {
		d = report.Jobs[0].Write
	}
	ns := func(v float64) time.Duration { return time.Duration(v) }
	return result{
		iops: d.IOPS, mbs: d.Bytes / 1e6, requests: d.Requests, most: ns(d.Latency.Max),
		p50: ns(d.Latency.Percentiles["50.000000"]), p99: ns(d.Latency.Percentiles["99.000000"]),
	}, nil
}

// readThrough reads a file from its beginning in pieces of 1 MiB, most bytes of
// it, and returns how long that took.
func readThrough(ctx context.Context, path string, flags int, most int64) (n int64, took time.Duration, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|flags, 0)
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	buffer := alignedBuffer(mib)
	begin := time.Now()
	for n < most && ctx.Err() == nil {
		got, err := f.Read(buffer[:min(most-n, mib)])
		if err != nil {
			return n, 0, fmt.Errorf("read %s at %d: %w", path, n, err)
		}
		n += int64(got)
	}
	return n, time.Since(begin), ctx.Err()
}
