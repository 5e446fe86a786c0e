package loopdev

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

var (
	// ErrBusy is returned for a device that somebody uses: it is mounted, part
	// of another device, or open.
	ErrBusy = errors.New("the loop device is in use")

	// ErrNotAttached is returned for a device without a backing file, and for
	// what is no loop device.
	ErrNotAttached = errors.New("not an attached loop device")

	// ErrFlush is returned when a device was detached, but its last writes did
	// not get through to the backing file and are lost.
	ErrFlush = errors.New("the last writes to the loop device are lost")
)

const (
	// attachTries bounds how often Attach loses the race for a free device.
	attachTries = 64

	// detachTime is how long Detach waits for others to close the device. What
	// opens a device by itself, such as udev, is done with it sooner.
	detachTime = 2 * time.Second

	// loopChangeFD is LOOP_CHANGE_FD of linux/loop.h, which x/sys does not have.
	loopChangeFD = 0x4c06
)

// Options says how a file is attached.
type Options struct {
	// ReadOnly makes the device refuse writes. The file is opened for reading.
	ReadOnly bool

	// SectorSize is the smallest unit the device can be read and written in, a
	// power of two from 512 to the page size. Zero leaves the choice to the
	// kernel.
	SectorSize int

	// ReadAheadKB is how far the kernel reads ahead of sequential readers, in
	// KiB; zero leaves it as it is, and so does a read-only sysfs, as in
	// containers. It may stay set when the device is detached.
	ReadAheadKB int

	// PartScan makes the partitions of the file devices as well: /dev/loop3p1.
	PartScan bool
}

// Attach attaches the file at path to a free loop device with direct I/O, and
// returns the device. If the kernel refuses direct I/O on the file, nothing
// stays attached. Bytes beyond the last whole 512 of the file are left out.
//
// The device stays until Detach; it keeps the file open.
func Attach(path string, o Options) (dev string, err error) {
	file, err := openBacking(path, o.ReadOnly)
	if err != nil {
		return "", err
	}
	defer file.Close() // the device has its own reference
	config := unix.LoopConfig{
		Fd:   uint32(file.Fd()),
		Size: uint32(o.SectorSize),
		Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_DIRECT_IO},
	}
	if o.ReadOnly {
		config.Info.Flags |= unix.LO_FLAGS_READ_ONLY
	}
	if o.PartScan {
		config.Info.Flags |= unix.LO_FLAGS_PARTSCAN
	}
	copy(config.Info.File_name[:len(config.Info.File_name)-1], path) // for losetup; sysfs has all of it
	if dev, err = configureFree(&config); err != nil {
		return "", fmt.Errorf("attach %s: %w", path, err)
	}
	if err := settle(dev, o); err != nil {
		return "", errors.Join(fmt.Errorf("attach %s: %w", path, err), Detach(dev))
	}
	return dev, nil
}

// openBacking opens a file as the backing of a device.
func openBacking(path string, readOnly bool) (*os.File, error) {
	flags := unix.O_RDWR
	if readOnly {
		flags = unix.O_RDONLY
	}
	// Not os.OpenFile: a file never needs the poller, and the path may be on a
	// slow filesystem.
	fd, err := unix.Open(path, flags|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// configureFree makes a free loop device one of config.
func configureFree(config *unix.LoopConfig) (dev string, err error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return "", fmt.Errorf("loop devices are not available: %w", err)
	}
	defer control.Close()
	for range attachTries {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return "", fmt.Errorf("find a free loop device: %w", err)
		}
		if dev, err = node("/dev", n); err != nil {
			return "", err
		}
		err = configure(dev, config)
		if err == nil {
			return dev, nil
		}
		// Free no longer, or removed already: LOOP_CTL_GET_FREE reserves nothing.
		if !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENXIO) && !errors.Is(err, unix.ENODEV) {
			return "", err
		}
		time.Sleep(rand.N(5 * time.Millisecond))
	}
	return "", fmt.Errorf("every free loop device was taken by others, %d times", attachTries)
}

func configure(dev string, config *unix.LoopConfig) error {
	f, err := os.OpenFile(dev, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.IoctlLoopConfigure(int(f.Fd()), config); err != nil {
		return &os.PathError{Op: "configure", Path: dev, Err: err}
	}
	return nil
}

// node returns the path of loop device n in a directory of devices. Where
// nobody makes nodes for new devices, as in containers, it does.
func node(dir string, n int) (string, error) {
	dev := filepath.Join(dir, "loop"+strconv.Itoa(n))
	if _, err := os.Stat(dev); !errors.Is(err, os.ErrNotExist) {
		return dev, err
	}
	number, err := attribute(dev, "dev")
	if err != nil {
		return "", fmt.Errorf("make %s: %w", dev, err)
	}
	if err := makeNode(dev, number); err != nil {
		return "", err
	}
	return dev, nil
}

// makeNode makes the node of a block device, whose number is as in "7:3", unless it
// is there. One of another number is a former partition's, which nobody took away.
func makeNode(dev, number string) error {
	var major, minor uint32
	if _, err := fmt.Sscanf(number, "%d:%d", &major, &minor); err != nil {
		return fmt.Errorf("make %s: device number %q: %w", dev, number, err)
	}
	want := unix.Mkdev(major, minor)
	var st unix.Stat_t
	err := unix.Stat(dev, &st)
	switch {
	case err == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK && st.Rdev == want:
		return nil
	case err == nil:
		err = os.Remove(dev)
	case err == unix.ENOENT:
		err = nil
	}
	if err != nil {
		return fmt.Errorf("make %s: %w", dev, err)
	}
	err = unix.Mknod(dev, unix.S_IFBLK|0o660, int(want))
	if err != nil && err != unix.EEXIST {
		return &os.PathError{Op: "mknod", Path: dev, Err: err}
	}
	return nil
}

// settle makes sure that a device just configured has direct I/O, and sets its
// readahead.
func settle(dev string, o Options) error {
	direct, err := attribute(dev, "loop/dio")
	if err != nil {
		return err
	}
	if direct != "1" {
		return fmt.Errorf("%s: the kernel refuses direct I/O on the file", dev)
	}
	if o.ReadAheadKB == 0 {
		return nil
	}
	value := strconv.Itoa(o.ReadAheadKB)
	err = os.WriteFile(attributePath(dev, "queue/read_ahead_kb"), []byte(value), 0)
	if errors.Is(err, os.ErrPermission) || errors.Is(err, unix.EROFS) {
		return nil
	}
	return err
}

// Detach detaches a device and returns when it is gone. What is in its page
// cache is written to the file first; if that fails the device is detached
// nevertheless and the error is ErrFlush. A device in use is left as it is, and
// the error is ErrBusy.
func Detach(dev string) error {
	backing, err := Backing(dev)
	if err != nil {
		return err
	}
	// Those who claim a device, such as filesystems, do so exclusively.
	f, err := os.OpenFile(dev, os.O_RDWR|unix.O_EXCL, 0)
	if errors.Is(err, unix.EROFS) || errors.Is(err, unix.EACCES) {
		f, err = os.OpenFile(dev, os.O_RDONLY|unix.O_EXCL, 0)
	}
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("detach %s: %w", dev, ErrBusy)
	}
	if err != nil {
		return fmt.Errorf("detach: %w", err)
	}
	flushErr := f.Sync()
	// This only marks the device: it goes when the last who has it open closes
	// it, which may be us.
	err = clearBacking(f)
	f.Close() // it is the device that counts now
	if errors.Is(err, unix.ENXIO) {
		return fmt.Errorf("detach %s: %w: somebody else was faster", dev, ErrNotAttached)
	}
	if err != nil {
		return fmt.Errorf("detach %s: %w", dev, err)
	}
	if err := awaitGone(dev, backing); err != nil {
		return fmt.Errorf("detach %s: %w", dev, err)
	}
	if flushErr != nil {
		return fmt.Errorf("detach %s: %w: %w", dev, ErrFlush, flushErr)
	}
	return nil
}

func clearBacking(f *os.File) error {
	if _, err := unix.IoctlRetInt(int(f.Fd()), unix.LOOP_CLR_FD); err != nil {
		return err
	}
	return nil
}

// awaitGone waits until a device marked to go is gone. If others hold on to it
// for too long it takes the mark off again and returns ErrBusy.
func awaitGone(dev, backing string) error {
	deadline := time.Now().Add(detachTime)
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		now, err := Backing(dev)
		if errors.Is(err, ErrNotAttached) || err == nil && now != backing {
			return nil // the latter: somebody has attached it anew
		}
		if err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return keep(dev)
		}
		time.Sleep(pause)
	}
}

// keep makes a device stay that was marked to go when its last user closes it.
// It returns nil if it came too late for that.
func keep(dev string) error {
	f, err := os.OpenFile(dev, os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	if errors.Is(err, unix.ENXIO) {
		return nil
	}
	if err != nil {
		return err
	}
	info.Flags &^= unix.LO_FLAGS_AUTOCLEAR
	if err := unix.IoctlLoopSetStatus64(int(f.Fd()), info); err != nil {
		return errors.Join(ErrBusy, err)
	}
	return ErrBusy
}

// Change makes a read-only device serve another file of the same size, at once
// and without those who have it open noticing. The device has direct I/O on the new
// file if the file allows it. A device that somebody claims, such as a mounted
// filesystem, is ErrBusy: to the kernel the medium changes, and since Linux 6.6 that
// shuts the filesystem down. Whoever wants to claim it meanwhile, which takes some
// milliseconds, is told that it is busy.
func Change(dev, path string) error {
	file, err := openBacking(path, true)
	if errors.Is(err, unix.EINVAL) { // a filesystem without direct I/O
		file, err = os.Open(path)
	}
	if err != nil {
		return err
	}
	defer file.Close() // the device has its own reference
	f, err := os.OpenFile(dev, os.O_RDONLY|unix.O_EXCL, 0)
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("change %s to %s: %w", dev, path, ErrBusy)
	}
	if err != nil {
		return err
	}
	defer f.Close() // nothing was written
	if err := unix.IoctlSetInt(int(f.Fd()), loopChangeFD, int(file.Fd())); err != nil {
		return fmt.Errorf("change %s to %s: %w", dev, path, err)
	}
	return nil
}

// Activity returns the counters of a device's I/O as the kernel prints them: the same
// twice means that nothing was read or written in between.
func Activity(dev string) (string, error) { return attribute(dev, "stat") }

// Backing returns the path of a device's backing file as the kernel knows it:
// absolute, free of symbolic links, and with " (deleted)" after it if the file
// was. ErrNotAttached: there is none.
func Backing(dev string) (string, error) {
	path, err := attribute(dev, "loop/backing_file")
	// ENXIO: the device was detached between open and read.
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENODEV) {
		return "", fmt.Errorf("%s: %w", dev, ErrNotAttached)
	}
	return path, err
}

// FindByBacking returns the devices whose backing file is at path, in no
// particular order; none is no error. It works for files that cannot be
// accessed any more, on a mount that is dead.
func FindByBacking(path string) ([]string, error) {
	want, err := resolve(path)
	if err != nil {
		return nil, err
	}
	attached, err := Attached()
	if err != nil {
		return nil, err
	}
	var devs []string
	for _, dev := range attached {
		backing, err := Backing(dev)
		switch {
		case errors.Is(err, ErrNotAttached): // detached meanwhile
		case err != nil:
			return nil, err
		case backing == want:
			devs = append(devs, dev)
		}
	}
	return devs, nil
}

// resolve makes a path absolute and free of symbolic links, as far as it can be
// accessed; what cannot is taken as it is.
func resolve(path string) (string, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	rest := ""
	for {
		resolved, err := filepath.EvalSymlinks(path)
		if err == nil {
			return filepath.Join(resolved, rest), nil
		}
		if path == "/" {
			return "", err
		}
		path, rest = filepath.Dir(path), filepath.Join(filepath.Base(path), rest)
	}
}

// attributePath returns where sysfs keeps an attribute of a device.
func attributePath(dev, name string) string {
	return filepath.Join("/sys/block", filepath.Base(dev), name)
}

func attribute(dev, name string) (string, error) {
	value, err := os.ReadFile(attributePath(dev, name))
	if err != nil {
		return "", err
	}
	return strings.TrimSuffix(string(value), "\n"), nil
}
