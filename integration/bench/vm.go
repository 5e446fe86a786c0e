package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// The ways in which the guest's disk is served, besides lazyvolName: a mounted volume
// that hydrates.
const (
	demandName = "lazyvol, only what is read" // of which the trace is recorded
	tracedName = "lazyvol, traced"            // and of which only that is fetched
)

// What is measured of a boot.
const (
	upSeconds   = "s until multi-user"
	waitSeconds = "s of waiting for the store"
	waitShare   = "% of the boot waiting"
	waitCount   = "reads that waited"
)

func vmRows() []row {
	share := func(text, system string, most float64) bar {
		return bar{text: text, unit: "%", got: of(system, waitShare), fixed: most, less: true, factor: 1}
	}
	return []row{{"vm", "a virtual machine boots Debian", bootVM, []bar{
		share("waits ≤ 20 % of its boot, cold", lazyvolName, 20),
		share("≤ 20 %, cold and not hydrated", demandName, 20),
		share("≤ 5 %, traced", tracedName, 5),
	}}}
}

// bootVM boots the guest of the VM tests from a copy of its disk, and from volumes of a
// snapshot of it of which the host has nothing.
func bootVM(ctx context.Context, r *turn) error {
	guest, err := command(ctx, "scripts/vm-image", r.tools)
	if err != nil {
		return err
	}
	near, err := r.newHost(r.server.direct)
	if err != nil {
		return err
	}
	snap, err := near.run(ctx, "snapshot", "create", filepath.Join(guest, "disk.img"))
	if err != nil {
		return err
	}
	dir, err := r.folder(rawName)
	if err != nil {
		return err
	}
	local := filepath.Join(dir, "disk.img")
	if err := copySparse(ctx, local, filepath.Join(guest, "disk.img")); err != nil {
		return err
	}
	if err := r.bootFrom(ctx, rawName, guest, local, nil); err != nil {
		return err
	}
	for _, way := range []struct {
		name  string
		flags []string
	}{
		{demandName, []string{"--no-hydrate", "--record-trace=" + r.bootTrace()}},
		{tracedName, []string{"--no-hydrate", "--trace=" + r.bootTrace()}},
		{lazyvolName, nil},
	} {
		h, err := r.farHost()
		if err != nil {
			return err
		}
		vol, err := h.run(ctx, "volume", "create", "--snapshot", snap)
		if err != nil {
			return err
		}
		m, err := r.mount(ctx, h, vol, way.flags...)
		if err != nil {
			return err
		}
		if err := r.bootFrom(ctx, way.name, guest, m.image, m); err != nil {
			return err
		}
		m.stop()
	}
	_, err = near.run(ctx, "snapshot", "delete", snap)
	return err
}

// bootTrace is the name of a round's trace.
func (r *turn) bootTrace() string { return fmt.Sprintf("boot-%d", r.number) }

// bootFrom boots the guest until it has powered off, and records how long it took until
// multi-user.target was reached and, of a mount, how much of that it waited for the
// store.
func (r *turn) bootFrom(ctx context.Context, name, guest, disk string, m *lvMount) error {
	ctx, cancel := context.WithTimeout(ctx, commandPatience)
	defer cancel()
	qemu := exec.CommandContext(ctx, "qemu-system-x86_64", "-machine", "q35", "-cpu", "max", "-accel", "tcg", "-m", "512",
		"-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio",
		"-kernel", filepath.Join(guest, "vmlinuz"), "-initrd", filepath.Join(guest, "initrd.img"), "-append", "root=/dev/vda rw console=ttyS0 guest.write=x",
		"-drive", "file="+disk+",format=raw,if=virtio,cache=none,aio=threads,discard=unmap")
	qemu.WaitDelay = endPatience
	var complaints, all bytes.Buffer
	qemu.Stderr = &complaints
	console, err := qemu.StdoutPipe()
	if err != nil {
		return err
	}
	begin := time.Now()
	if err := qemu.Start(); err != nil {
		return err
	}
	up := false
	var failed error
	lines := bufio.NewScanner(io.TeeReader(console, &all))
	for lines.Scan() {
		if strings.Contains(lines.Text(), "multi-user.target is active") {
			up, failed = true, r.recordBoot(name, time.Since(begin), m)
		}
	}
	err = errors.Join(lines.Err(), qemu.Wait(), failed)
	if err == nil && !up {
		err = errors.New("it powered off before")
	}
	if err != nil {
		return fmt.Errorf("the guest did not boot from %s: %w: %s%s", name, err, tail(complaints.Bytes()), tail(all.Bytes()))
	}
	return nil
}

func (r *turn) recordBoot(name string, took time.Duration, m *lvMount) error {
	r.record(name, upSeconds, took.Seconds())
	if m == nil {
		return nil
	}
	s, err := m.status()
	if err != nil {
		return err
	}
	r.record(name, waitSeconds, s.DemandWait)
	r.record(name, waitShare, 100*s.DemandWait/took.Seconds())
	r.record(name, waitCount, float64(s.DemandWaits))
	r.record(name, fetchedMB, float64(s.FetchedBytes)/1e6)
	return nil
}
