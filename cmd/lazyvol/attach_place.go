package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/lazyvol/lazyvol/fs"
	"github.com/lazyvol/lazyvol/internal/loopdev"
)

// A place is where a snapshot or volume is attached, or will be.
type place struct {
	id      string
	dir     string   // the mountpoint under the loop devices
	served  bool     // by a daemon, in sight
	hidden  error    // why it cannot be used: its daemon was told to end, and is in use
	devices []string // loop devices that work
	strays  []string // loop devices on a mount that is out of sight
	dead    []string // mountpoints of it that killed daemons left
	broken  []string // loop devices on those

	pid  int    // of a volume's daemon
	lock string // that it holds
}

// isAttachDir reports whether dir is one that attach makes, also if the kernel
// names it, which knows no symbolic links.
func (a *app) isAttachDir(dir string) bool {
	parent := filepath.Clean(a.attachDir(""))
	if filepath.Dir(dir) == parent {
		return true
	}
	parent, err := filepath.EvalSymlinks(parent)
	return err == nil && filepath.Dir(dir) == parent
}

// readOnly reports whether it is a snapshot.
func (p *place) readOnly() bool { return isSnapshot(p.id) }

func isSnapshot(target string) bool { return strings.HasPrefix(target, "snap-") }
func isVolume(target string) bool   { return strings.HasPrefix(target, "vol-") }

// place finds out where a snapshot or volume is attached.
func (a *app) place(ctx context.Context, target string) (*place, error) {
	p := &place{id: target, dir: a.attachDir(target)}
	switch {
	case isVolume(target):
		s, err := a.statusOf(ctx, target)
		if err != nil {
			return nil, err
		}
		if s.Mountpoint != "" {
			p.dir, p.hidden = s.Mountpoint, inSight(s)
			p.served = p.hidden == nil
			p.pid = s.PID
			if p.lock, err = a.lockOf(s); err != nil {
				return nil, err
			}
		}
	case isSnapshot(target):
		if _, err := parseSnapshot(target); err != nil {
			return nil, err
		}
		_, err := statusOfMount(ctx, p.dir)
		p.served = err == nil
		killed := isAny(err, unix.ENOTCONN, unix.ECONNABORTED)
		if !p.served && !killed && exitCode(err) != exitNotFound {
			return nil, err
		}
	default:
		return nil, usageError{fmt.Errorf("%q is neither a snapshot (snap-…) nor a volume (vol-…)", target)}
	}
	return p, a.findDevices(p)
}

// findDevices fills in the devices of a place, and what killed daemons left.
func (a *app) findDevices(p *place) error {
	mounts, err := fs.Mountpoints()
	if err != nil {
		return err
	}
	for _, m := range mounts {
		// A snapshot may be mounted elsewhere too, by others.
		if m.ID() != p.id || isSnapshot(p.id) && !a.isAttachDir(m.Dir) || slices.Contains(p.dead, m.Dir) || !deadMount(m.Dir) {
			continue
		}
		p.dead = append(p.dead, m.Dir)
		devs, err := loopdev.FindByBacking(filepath.Join(m.Dir, fs.ImageName))
		if err != nil {
			return err
		}
		p.broken = append(p.broken, devs...)
	}
	devs, err := a.loopsOf(p.dir)
	if err != nil {
		return err
	}
	p.devices = slices.DeleteFunc(devs, func(dev string) bool { return slices.Contains(p.broken, dev) })
	if !p.served {
		p.strays, err = a.strays(p.id, mounts)
	}
	return err
}

// strays returns the loop devices of what is out of sight, as far as a
// filesystem that attach mounted shows them.
func (a *app) strays(target string, mounts []fs.Mountpoint) (devs []string, err error) {
	r, err := a.attachment(target)
	if err != nil || len(r.Mounts) == 0 {
		return nil, err
	}
	loops, err := loopdev.Attached()
	if err != nil {
		return nil, err
	}
	for _, dev := range loops {
		backing, err := loopdev.Backing(dev)
		if errors.Is(err, loopdev.ErrNotAttached) || err == nil && backing != hiddenImage {
			continue
		}
		if err != nil {
			return nil, err
		}
		on, err := mountsOn(dev, mounts)
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(on, r.has) {
			devs = append(devs, dev)
		}
	}
	return devs, nil
}

// hiddenImage is what the kernel has as the backing of a loop device on a mount that
// is out of sight.
const hiddenImage = "/" + fs.ImageName

// has reports whether attach mounted m.
func (r attachment) has(m fs.Mountpoint) bool {
	return slices.ContainsFunc(r.Mounts, func(ours attachedMount) bool { return ours.Dir == m.Dir && ours.Device == m.Source })
}

// mountsOn returns those of mounts that are of a loop device or of its partitions.
func mountsOn(dev string, mounts []fs.Mountpoint) (on []fs.Mountpoint, err error) {
	numbers, err := loopdev.Numbers(dev)
	if err != nil {
		return nil, err
	}
	for _, m := range mounts {
		// Not the source of what FUSE serves: any user may say anything there.
		served := m.Type == "fuse" || strings.HasPrefix(m.Type, "fuse.")
		if slices.Contains(numbers, m.Device) || !served && slices.Contains(numbers, deviceNumber(m.Source)) {
			on = append(on, m)
		}
	}
	return on, nil
}

// deviceNumber returns the number of a block device, as in "7:3", and "" for
// anything else.
func deviceNumber(path string) string {
	if !strings.HasPrefix(path, "/dev/") { // what else a source is may be slow to look up
		return ""
	}
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return ""
	}
	return fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
}

// mountsOf returns the filesystems mounted on some devices and their partitions, in
// the order of mounting: those that attach mounted, and all others.
func (a *app) mountsOf(target string, devs []string) (ours []attachedMount, others []fs.Mountpoint, err error) {
	mounts, err := fs.Mountpoints()
	if err != nil {
		return nil, nil, err
	}
	r, err := a.attachment(target)
	if err != nil {
		return nil, nil, err
	}
	for _, dev := range devs {
		on, err := mountsOn(dev, mounts)
		if err != nil {
			return nil, nil, err
		}
		for _, m := range on {
			at := slices.IndexFunc(r.Mounts, func(ours attachedMount) bool { return ours.Dir == m.Dir && ours.Device == m.Source })
			if at >= 0 {
				ours = append(ours, r.Mounts[at])
			} else {
				others = append(others, m)
			}
		}
	}
	return ours, others, nil
}

// placeOfDevice finds out what a loop device, or that of a partition, is attached to.
func (a *app) placeOfDevice(ctx context.Context, dev string) (*place, error) {
	dev = loopdev.Whole(dev)
	image, err := loopdev.Backing(dev)
	if errors.Is(err, loopdev.ErrNotAttached) {
		return nil, codedError{err.Error(), exitNotFound}
	}
	if err != nil {
		return nil, err
	}
	notOurs := codedError{fmt.Sprintf("%s is not attached to a snapshot or volume of lazyvol, but to %s", dev, image), exitNotFound}
	if image == hiddenImage {
		return a.placeOfStray(ctx, dev)
	}
	dir, err := a.mountOfImage(image)
	if err != nil {
		return nil, notOurs
	}
	mounts, err := fs.Mountpoints()
	if err != nil {
		return nil, err
	}
	id := ""
	for _, m := range mounts { // the topmost
		if m.Dir == dir {
			id = m.ID()
		}
	}
	if id == "" && a.isAttachDir(dir) { // the mount has gone, the local file has not
		id = filepath.Base(dir)
	}
	if id == "" {
		return nil, notOurs
	}
	p := &place{id: id, dir: dir}
	p.served = !deadMount(dir)
	if !p.served {
		p.dead = []string{dir}
	} else if _, err := statusOfMount(ctx, dir); errors.Is(err, errNoAnswer) { // nor would it take what is to be written
		return nil, err
	}
	if p.served || filepath.Dir(image) != dir { // moved to the local file, which needs no daemon
		p.devices = []string{dev}
	} else {
		p.broken = []string{dev}
	}
	return p, nil
}

// placeOfStray is placeOfDevice for a device on a mount that is out of sight.
func (a *app) placeOfStray(ctx context.Context, dev string) (*place, error) {
	all, err := a.attachments()
	if err != nil {
		return nil, err
	}
	mounts, err := fs.Mountpoints()
	if err != nil {
		return nil, err
	}
	on, err := mountsOn(dev, mounts)
	if err != nil {
		return nil, err
	}
	for id, r := range all {
		if slices.ContainsFunc(on, r.has) {
			return a.place(ctx, id)
		}
	}
	return &place{dir: "/", strays: []string{dev}}, nil
}

// placeOfMount finds out what a directory was mounted from by attach, or is by
// others.
func (a *app) placeOfMount(ctx context.Context, dir string) (*place, error) {
	on, path, err := fs.MountedOn(dir)
	if errors.Is(err, unix.ENOENT) {
		path, err = filepath.Abs(dir)
	}
	if err != nil {
		return nil, err
	}
	if on.Dir != "" {
		dev, err := loopOf(on)
		if err != nil {
			return nil, err
		}
		if dev != "" {
			return a.placeOfDevice(ctx, dev)
		}
	}
	// Unmounted by hand, perhaps: what attach did besides is still to be undone.
	all, err := a.attachments()
	if err != nil {
		return nil, err
	}
	for id, r := range all {
		if on.Dir == "" && slices.ContainsFunc(r.Mounts, attachedMount{Dir: path}.sameDir) {
			return a.place(ctx, id)
		}
	}
	return nil, codedError{fmt.Sprintf("nothing that is attached is mounted on %s", dir), exitNotFound}
}

// loopOf returns the loop device on which a filesystem lies, "" if it is on none.
func loopOf(m fs.Mountpoint) (string, error) {
	loops, err := loopdev.Attached()
	if err != nil {
		return "", err
	}
	for _, dev := range loops {
		on, err := mountsOn(dev, []fs.Mountpoint{m})
		if err != nil && !errors.Is(err, unix.ENOENT) { // detached meanwhile
			return "", err
		}
		if len(on) > 0 {
			return dev, nil
		}
	}
	return "", nil
}
