package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// What the files of the image are searched through.
const (
	needName   = "exactly what is read" // without readahead, which is what the trace is recorded from
	coldName   = "lazyvol, cold"
	warmedName = "lazyvol, warm"
	fetchedMB  = "fetched MB"
)

func traceRows() []row {
	return []row{{"trace", "grep -r of the image's files, traced", searchTraced, []bar{
		{text: "≤ 1.25 × the warm one", unit: ms, got: of(lazyvolName, ms), refs: []key{of(warmedName, ms)}, less: true, factor: 1.25},
		{text: "≤ 1.2 × the bytes it needs", unit: "MB", got: of(lazyvolName, fetchedMB), refs: []key{of(needName, fetchedMB)}, less: true, factor: 1.2},
	}}}
}

// traceName is what the trace is saved under.
const traceName = "grep"

// searchTraced searches the image's files through a loop device four times: to record
// a trace, cold, cold with the trace, and once more with all of it on the host.
func searchTraced(ctx context.Context, r *turn) error {
	recorder, err := r.farHost()
	if err != nil {
		return err
	}
	need, err := r.search(ctx, recorder, "--no-hydrate", "--read-ahead=0", "--record-trace="+traceName)
	if err != nil {
		return err
	}
	r.record(needName, fetchedMB, need.fetched)
	r.record(needName, ms, milliseconds(need.took))
	h, err := r.farHost()
	if err != nil {
		return err
	}
	cold, err := r.search(ctx, h, "--no-hydrate")
	if err != nil {
		return err
	}
	r.record(coldName, fetchedMB, cold.fetched)
	r.record(coldName, ms, milliseconds(cold.took))
	if h, err = r.farHost(); err != nil {
		return err
	}
	traced, err := r.search(ctx, h, "--no-hydrate", "--trace="+traceName)
	if err != nil {
		return err
	}
	r.record(lazyvolName, fetchedMB, traced.fetched)
	r.record(lazyvolName, ms, milliseconds(traced.took))
	warm, err := r.search(ctx, h, "--no-hydrate")
	if err != nil {
		return err
	}
	r.record(warmedName, ms, milliseconds(warm.took))
	return nil
}

// A searched is what a search took.
type searched struct {
	took    time.Duration // of the search alone: the filesystem was mounted
	fetched float64       // MB, from the mount on
}

// search searches all files of the image for what is in none of them, so that all
// bytes are read.
func (r *turn) search(ctx context.Context, h *host, flags ...string) (s searched, err error) {
	device, m, err := r.attach(ctx, h, r.snap, flags...)
	if err != nil {
		return s, err
	}
	defer m.stop()
	dir := filepath.Join(h.dir, "files")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return s, err
	}
	if _, err := command(ctx, "mount", "-o", "ro,noload", device, dir); err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, unmountFiles(dir)) }()
	begin := time.Now()
	out, err := exec.CommandContext(ctx, "grep", "-r", "--binary-files=text", "-F", "-l", "no file has this: \x01\x02\x03\x04", dir).Output()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 { // 1: found nothing, which is right
		return s, fmt.Errorf("grep: %q, %w", tail(out), err)
	}
	s.took = time.Since(begin)
	status, err := m.status()
	s.fetched = float64(status.FetchedBytes) / 1e6
	return s, err
}

// unmountFiles unmounts a filesystem whatever became of the run.
func unmountFiles(dir string) error {
	ctx, cancel := context.WithTimeout(context.Background(), endPatience)
	defer cancel()
	_, err := command(ctx, "umount", dir)
	return err
}
