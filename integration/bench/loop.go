package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"time"
)

// rawLoopName is a loop device, with direct I/O, on the raw file.
const rawLoopName = "loop on raw"

func loopRows() []row {
	complete := []bar{
		{text: "≥ 0.8 × a loop device on the raw file", unit: iops, got: of(lazyvolName, iops), refs: []key{of(rawLoopName, iops)}, factor: 0.8},
		{text: "no FUSE request: the daemon reads nothing", unit: "reads per I/O", got: of(lazyvolName, "reads per I/O"), fixed: 0.001, less: true, factor: 1},
	}
	return []row{
		{"loop-complete", "complete snapshot through attach, attached when complete, QD16", loopComplete(true), complete},
		{"loop-becomes-complete", "complete snapshot through attach, attached before, QD16", loopComplete(false), complete},
		{"loop-write", "4 KiB random writes through attach, QD16", loopWrite, []bar{
			{text: "≥ 0.8 × those on volume.img", unit: iops, got: of(lazyvolName, iops), refs: []key{of(imageName, iops)}, factor: 0.8},
		}},
		{"loop-cold", "loop device over the mount, cold, QD32, each block touched once", loopCold, []bar{
			{text: "≥ 16 requests in flight", unit: requests, got: of(lazyvolName, "requests in flight"), fixed: 16, factor: 1},
			{text: "≥ 0.8 × the parallel GETs", unit: rate, got: of(lazyvolName, storedRate), refs: []key{of(ceilingName, storedRate)}, factor: 0.8},
		}},
	}
}

// attach attaches a snapshot or volume until the row ends.
func (r *turn) attach(ctx context.Context, h *host, id string, flags ...string) (device string, m *lvMount, err error) {
	device, err = h.run(ctx, append(append([]string{"attach"}, flags...), id)...)
	if err != nil {
		return "", nil, err
	}
	m, err = h.mounted(id, filepath.Join(h.dir, "state", "attached", id), func(ctx context.Context) error {
		_, err := h.run(ctx, "detach", id)
		if err != nil {
			detachLoop(device)
		}
		return err
	})
	if err != nil {
		return "", nil, err
	}
	r.own(m)
	return device, m, nil
}

// detachLoop detaches a loop device whatever became of its file.
func detachLoop(device string) {
	ctx, cancel := context.WithTimeout(context.Background(), endPatience)
	defer cancel()
	_, _ = command(ctx, "losetup", "--detach", device) // fails if it is detached
}

// loopOnRaw attaches a loop device to a copy of the image, until the row ends.
func (r *turn) loopOnRaw(ctx context.Context) (device string, err error) {
	path, err := r.copyOfImage(ctx, "loop")
	if err != nil {
		return "", err
	}
	if device, err = command(ctx, "losetup", "--find", "--show", "--direct-io=on", path); err != nil {
		return "", err
	}
	stop := once(func() {
		detachLoop(device)
		_ = os.Remove(path) // the folder goes at the end
	})
	r.later(stop)
	r.atEnd(stop)
	return device, nil
}

// loopComplete reads from a loop device on a snapshot that is on this host as a
// whole.
func loopComplete(before bool) func(context.Context, *turn) error {
	return func(ctx context.Context, r *turn) error {
		h, err := r.farHost()
		if err != nil {
			return err
		}
		if before {
			m, err := r.mount(ctx, h, r.snap)
			if err != nil {
				return err
			}
			if err := m.hydrated(ctx); err != nil {
				return err
			}
			m.stop()
		}
		device, m, err := r.attach(ctx, h, r.snap)
		if err != nil {
			return err
		}
		if err := m.hydrated(ctx); err != nil {
			return err
		}
		// What follows completion, such as another backing file for the
		// device, may take the daemon a moment.
		const moment = 2 * time.Second
		time.Sleep(moment)
		rawDevice, err := r.loopOnRaw(ctx)
		if err != nil {
			return err
		}
		j := job{rw: "randread", block: "4k", depth: 16}
		readsBefore, err := procValue(m.pid, "io", "syscr")
		if err != nil {
			return err
		}
		found, err := r.fio(ctx, device, j)
		if err != nil {
			return err
		}
		readsAfter, err := procValue(m.pid, "io", "syscr")
		if err != nil {
			return err
		}
		r.record(lazyvolName, iops, found.iops)
		// Every FUSE request is read from /dev/fuse.
		r.record(lazyvolName, "reads per I/O", float64(readsAfter-readsBefore)/float64(max(found.requests, 1)))
		if found, err = r.fio(ctx, rawDevice, j); err != nil {
			return err
		}
		r.record(rawLoopName, iops, found.iops)
		return nil
	}
}

// hydrated waits until everything is on this host.
func (m *lvMount) hydrated(ctx context.Context) error {
	return waitFor(ctx, m.id+" is hydrated", func() (bool, error) {
		time.Sleep(10 * time.Millisecond) // asking is work for the daemon
		s, err := m.status()
		return s.State == "hydrated", err
	})
}

// imageName is volume.img, where the row is about a loop device.
const imageName = "volume.img"

func loopWrite(ctx context.Context, r *turn) error {
	h, err := r.farHost()
	if err != nil {
		return err
	}
	id, err := h.newVolume(ctx)
	if err != nil {
		return err
	}
	device, m, err := r.attach(ctx, h, id)
	if err != nil {
		return err
	}
	if err := m.hydrated(ctx); err != nil {
		return err
	}
	j := job{rw: "randwrite", block: "4k", depth: 16}
	// Once before both: where a page is written first, there is more to do.
	if _, err := r.fio(ctx, m.image, j); err != nil {
		return err
	}
	found, err := r.fio(ctx, device, j)
	if err != nil {
		return err
	}
	r.record(lazyvolName, iops, found.iops)
	if found, err = r.fio(ctx, m.image, j); err != nil {
		return err
	}
	r.record(imageName, iops, found.iops)
	return nil
}

// loopCold reads a page of every block from 32 goroutines.
func loopCold(ctx context.Context, r *turn) (err error) {
	if err := r.recordCeiling(ctx); err != nil {
		return err
	}
	h, err := r.farHost()
	if err != nil {
		return err
	}
	device, m, err := r.attach(ctx, h, r.snap, "--no-hydrate")
	if err != nil {
		return err
	}
	const depth = 32
	pages := r.stored.pages(10)
	passed := r.server.tap.watch()
	cpu, err := r.startMeter(m.pid)
	if err != nil {
		return err
	}
	pagers := make(chan *pager, depth)
	for range depth {
		p, err := openPager(device, os.O_RDONLY)
		if err != nil {
			return err
		}
		defer p.close(&err)
		pagers <- p
	}
	begin := time.Now()
	err = inParallel(depth, len(pages), func(i int) error {
		p := <-pagers
		defer func() { pagers <- p }()
		_, err := p.read(pages[i])
		return errors.Join(err, ctx.Err())
	})
	if err != nil {
		return err
	}
	took := time.Since(begin)
	seen := passed.traffic()
	r.record(lazyvolName, "requests in flight", float64(seen.peak))
	r.record(lazyvolName, storedRate, mbs(seen.of("GET", "/packs/").received(), took))
	r.record(lazyvolName, "requests per block", float64(len(seen.of("GET", "/packs/").requests))/float64(len(pages)))
	return r.recordCores(cpu)
}
