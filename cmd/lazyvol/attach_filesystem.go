package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/lazyvol/lazyvol/fs"
	"github.com/lazyvol/lazyvol/internal/loopdev"
	"github.com/lazyvol/lazyvol/internal/probe"
)

// filesystemFlags say which filesystem of a device is mounted where.
type filesystemFlags struct {
	dir       string // "": none is mounted
	partition int    // 0: the device itself; anyPartition: whichever can be mounted
	options   string
}

const anyPartition = -1

func (f *filesystemFlags) register(c *cobra.Command) {
	c.Flags().StringVar(&f.dir, "mount", "", "mount the filesystem inside on this `DIR` as well")
	c.Flags().IntVar(&f.partition, "partition", anyPartition, "mount partition `N`; 0: the device is not partitioned (default: the one that has a filesystem)")
	c.Flags().StringVar(&f.options, "mount-options", "", "more options for mount(8), as `OPT,OPT`")
}

// notForMount are options that make mount(8) do something else than to mount the
// device.
var notForMount = []string{"bind", "rbind", "move", "remount", "loop", "offset", "sizelimit"}

// check checks the flags for a snapshot or volume, and makes dir what the kernel
// will call it.
func (f *filesystemFlags) check(c *cobra.Command, target string) error {
	if f.dir == "" {
		if c.Flags().Changed("partition") || f.options != "" || c.Flags().Changed("mount") {
			return usageError{errors.New("--partition and --mount-options go with --mount DIR")}
		}
		return nil
	}
	if f.partition < anyPartition {
		return usageError{fmt.Errorf("--partition %d: partitions count from 1", f.partition)}
	}
	for option := range strings.SplitSeq(f.options, ",") {
		name, _, _ := strings.Cut(option, "=")
		if slices.Contains(notForMount, name) {
			return usageError{fmt.Errorf("--mount-options %s is not for a device that attach mounts", name)}
		}
		if name == "rw" && isSnapshot(target) {
			return usageError{errors.New("--mount-options rw: a snapshot is read-only; make a volume of it to write")}
		}
	}
	_, path, err := fs.MountedOn(f.dir)
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("mountpoint %s does not exist; make it first", f.dir)
	}
	if err != nil {
		return fmt.Errorf("mountpoint %s: %w", f.dir, err)
	}
	f.dir = path
	return nil
}

// refuseTaken refuses a folder on which something else than the place's own
// filesystem is mounted.
func (f *filesystemFlags) refuseTaken(p *place) error {
	if f.dir == "" {
		return nil
	}
	on, _, err := fs.MountedOn(f.dir)
	if err != nil || on.Dir == "" {
		return err
	}
	for _, dev := range slices.Concat(p.devices, p.broken) {
		if ours, err := mountsOn(dev, []fs.Mountpoint{on}); err != nil || len(ours) > 0 {
			return err
		}
	}
	return refusal{fmt.Errorf("something is mounted on %s already: %s (%s)", f.dir, on.Source, on.Type)}
}

// mountFilesystem mounts the filesystem on a loop device as the flags say, unless it is
// mounted there.
func (a *app) mountFilesystem(ctx context.Context, target, dev string, f *filesystemFlags) error {
	on, _, err := fs.MountedOn(f.dir)
	if err != nil {
		return err
	}
	if on.Dir != "" {
		return f.sameMount(dev, on)
	}
	volume, err := chooseFilesystem(ctx, dev, f.partition)
	if err != nil {
		return err
	}
	m := attachedMount{Dir: f.dir, Device: volume.Path, Partition: volume.Number, Type: volume.content.Type}
	m.Options = mountOptions(m.Type, isSnapshot(target), f.options)
	if err := a.mountRecorded(ctx, target, &m); err != nil {
		return err
	}
	if isSnapshot(target) && volume.content.Dirty {
		a.note("the filesystem was in use when %s was made, and its last changes are in its journal, which is not replayed: to see them make a volume of the snapshot, and attach that", target)
	}
	return nil
}

// sameMount refuses a folder on which another partition is mounted than the flags
// want.
func (f *filesystemFlags) sameMount(dev string, on fs.Mountpoint) error {
	wanted := dev
	if f.partition > 0 {
		wanted = fmt.Sprintf("%sp%d", dev, f.partition)
	}
	ours, err := mountsOn(dev, []fs.Mountpoint{on})
	if err != nil {
		return err
	}
	if len(ours) == 0 || f.partition != anyPartition && deviceNumber(on.Source) != deviceNumber(wanted) {
		return refusal{fmt.Errorf("something is mounted on %s already: %s (%s)", f.dir, on.Source, on.Type)}
	}
	return nil
}

// mountOptions returns what mount(8) is told. A read-only device cannot take what a
// journal has to replay, and its filesystem is refused unless that is left undone.
func mountOptions(kind string, readOnly bool, more string) string {
	options := []string{"rw"}
	if readOnly {
		// What an old system had may have holes by now, or be somebody else's.
		options = []string{"ro", "nosuid", "nodev"}
		switch kind {
		case "ext2":
			options = append(options, noPanic)
		case "ext3", "ext4":
			options = append(options, "noload", noPanic)
		case "xfs":
			// The original may be mounted as well, which has the same UUID.
			options = append(options, "norecovery", "nouuid")
		case "btrfs":
			options = append(options, "rescue=nologreplay")
		case "f2fs":
			options = append(options, "norecovery")
		}
	}
	if more != "" {
		options = append(options, more)
	}
	return strings.Join(options, ",")
}

// noPanic is for ext2, ext3 and ext4, whose superblock may say that an error in them is to
// stop the whole host.
const noPanic = "errors=remount-ro"

// mountRecorded mounts a filesystem, and puts it on record before.
func (a *app) mountRecorded(ctx context.Context, target string, m *attachedMount) error {
	if err := a.recordMount(target, *m); err != nil {
		return err
	}
	err := runMount(ctx, *m)
	if err != nil && m.Type == "xfs" && !strings.Contains(m.Options, "nouuid") && ctx.Err() == nil {
		// XFS takes no UUID twice: that of a restored volume is its original's.
		with := *m
		with.Options += ",nouuid"
		if runMount(ctx, with) == nil {
			a.note("%s is mounted with nouuid: another xfs with its UUID is mounted, perhaps its original", m.Device)
			*m, err = with, a.recordMount(target, with)
		}
	}
	if err == nil {
		return nil
	}
	if on, _, look := fs.MountedOn(m.Dir); look == nil && on.Source == m.Device { // somebody was faster
		return nil
	}
	if m.Lost { // to be tried again
		return err
	}
	return errors.Join(err, a.forgetMount(target, *m))
}

// mountAgain mounts what was mounted before the daemon was killed, on a former device of
// the same. Until it is mounted it stays on record as lost.
func (a *app) mountAgain(ctx context.Context, target, dev string, m attachedMount) error {
	err := a.tryMountAgain(ctx, target, dev, m)
	if err != nil {
		return fmt.Errorf("mount %s again, which was mounted when the daemon was killed ('lazyvol detach %s' gives it up): %w", m.Dir, target, err)
	}
	return nil
}

func (a *app) tryMountAgain(ctx context.Context, target, dev string, m attachedMount) error {
	m.Device = dev
	if m.Partition > 0 {
		volume, err := chooseFilesystem(ctx, dev, m.Partition)
		if err != nil {
			return err
		}
		m.Device = volume.Path
	}
	on, _, err := fs.MountedOn(m.Dir)
	if err != nil {
		return err
	}
	switch {
	case on.Dir == "":
		err = a.mountRecorded(ctx, target, &m)
	case on.Source != m.Device:
		err = refusal{fmt.Errorf("something is mounted on %s already: %s (%s)", m.Dir, on.Source, on.Type)}
	}
	if err != nil {
		return err
	}
	m.Lost = false
	return a.recordMount(target, m)
}

// runMount runs mount(8), which knows options, helpers and security labels that the
// system call does not. How long it takes the read deadline of the device bounds.
func runMount(ctx context.Context, m attachedMount) (err error) {
	// The device of a complete snapshot is claimed for some milliseconds when it is
	// moved to the local file.
	const tries = 3
	for try := 1; ; try++ {
		if err = tryMount(ctx, m); err == nil || try == tries || ctx.Err() != nil {
			return err
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func tryMount(ctx context.Context, m attachedMount) error {
	c := exec.CommandContext(ctx, "mount", "-t", m.Type, "-o", m.Options, m.Device, m.Dir)
	c.WaitDelay = 5 * time.Second
	out, err := c.CombinedOutput()
	switch {
	case ctx.Err() != nil && err != nil:
		return context.Cause(ctx)
	case err != nil && len(bytes.TrimSpace(out)) > 0:
		return fmt.Errorf("mount %s (%s) on %s with %s: %s: %w", m.Device, m.Type, m.Dir, m.Options, bytes.TrimSpace(out), err)
	case err != nil:
		return fmt.Errorf("mount %s (%s) on %s with %s: %w", m.Device, m.Type, m.Dir, m.Options, err)
	}
	return nil
}

// A candidate is a device or partition that may have a filesystem.
type candidate struct {
	loopdev.Partition // number 0: the device itself
	content           probe.Content
}

// findPartitions returns the partitions of a loop device. A kernel that was built
// without support for its partition table is told of them by partx(8).
func findPartitions(ctx context.Context, dev string) ([]loopdev.Partition, error) {
	found, err := loopdev.Partitions(dev)
	if err != nil || len(found) > 0 {
		return found, err
	}
	content, err := probeDevice(dev)
	if err != nil || !content.Table || content.Mountable {
		return nil, err
	}
	c := exec.CommandContext(ctx, "partx", "--add", dev)
	c.WaitDelay = 5 * time.Second
	if out, err := c.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("the kernel found no partitions on %s, and nor did partx: %s: %w", dev, bytes.TrimSpace(out), err)
	}
	return loopdev.Partitions(dev)
}

// chooseFilesystem finds the filesystem of a device that is to be mounted.
func chooseFilesystem(ctx context.Context, dev string, partition int) (candidate, error) {
	whole := candidate{Partition: loopdev.Partition{Path: dev}}
	partitions, err := findPartitions(ctx, dev)
	if err == nil && (len(partitions) == 0 || partition == 0) {
		whole.content, err = probeDevice(dev)
	}
	if err != nil {
		return whole, err
	}
	if len(partitions) == 0 || partition == 0 {
		if partition > 0 {
			return whole, codedError{fmt.Sprintf("%s has no partitions", dev), exitNotFound}
		}
		if !whole.content.Mountable {
			return whole, refusal{fmt.Errorf("%s holds %s: %s", dev, describeContent(whole.content), advice(whole.content))}
		}
		return whole, nil
	}
	var all, mountable []candidate
	for _, p := range partitions {
		c := candidate{Partition: p}
		if c.content, err = probeDevice(p.Path); err != nil {
			return whole, err
		}
		all = append(all, c)
		if c.content.Mountable {
			mountable = append(mountable, c)
		}
	}
	if partition > 0 {
		at := slices.IndexFunc(all, func(c candidate) bool { return c.Number == partition })
		if at < 0 {
			return whole, codedError{fmt.Sprintf("%s has no partition %d; it has\n%s", dev, partition, listCandidates(all)), exitNotFound}
		}
		if !all[at].content.Mountable {
			return whole, refusal{fmt.Errorf("partition %d of %s holds %s: %s", partition, dev, describeContent(all[at].content), advice(all[at].content))}
		}
		return all[at], nil
	}
	if len(mountable) != 1 {
		return whole, refusal{fmt.Errorf("%s has %d partitions with a filesystem; choose one with --partition N:\n%s", dev, len(mountable), listCandidates(all))}
	}
	return mountable[0], nil
}

func probeDevice(dev string) (probe.Content, error) {
	f, err := os.Open(dev)
	if err != nil {
		return probe.Content{}, fmt.Errorf("look for a filesystem: %w", err)
	}
	defer f.Close() // nothing was written
	c, err := probe.Probe(f)
	if err != nil {
		return c, fmt.Errorf("%s: %w", dev, err)
	}
	return c, nil
}

// advice tells what can be done with what is no filesystem.
func advice(c probe.Content) string {
	switch c.Type {
	case "":
		return "make one on the device that 'lazyvol attach' prints without --mount, or mount it by hand"
	case "btrfs":
		return "attach all of its devices without --mount, and mount it by hand"
	}
	return "attach it without --mount, and open it with its own tools"
}

func describeContent(c probe.Content) string {
	switch {
	case c.Type == "":
		return "no filesystem that is known"
	case c.Type == "btrfs" && !c.Mountable:
		return "one of several devices of a btrfs"
	case !c.Mountable:
		return c.Type + ", which is no filesystem"
	}
	return c.Type
}

// listCandidates lists partitions for people to choose from.
func listCandidates(all []candidate) string {
	var lines []string
	for _, c := range all {
		kind := c.content.Type
		if kind == "" {
			kind = "unknown"
		}
		line := fmt.Sprintf("  %d  %s  %s", c.Number, size(c.Size), kind)
		for _, name := range []string{c.Name, c.content.Label} {
			if name != "" {
				line += fmt.Sprintf("  %q", name)
			}
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "\n")
}
