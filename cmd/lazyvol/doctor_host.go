package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/lazyvol/lazyvol/fs"
)

// What the checks of a host go by.
const (
	loopConfigureKernel = "5.8" // the first with LOOP_CONFIGURE, which attach needs
	defaultMountMax     = 1000  // of fusermount3

	// enoughFiles is what a daemon may have open: 128 connections to the store, as
	// many files of layers again, and some.
	enoughFiles = 512

	fuseConf = "/etc/fuse.conf"
)

func examineKernel(context.Context) finding {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return fail("", "uname: %v", err)
	}
	return judgeKernel(unix.ByteSliceToString(name.Release[:]))
}

func judgeKernel(release string) finding {
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		return warn("compare it with what 'lazyvol attach' needs: Linux "+loopConfigureKernel, "Linux %s is of no version that is known", release)
	}
	if major < 5 || major == 5 && minor < 8 {
		return warn("use a kernel of "+loopConfigureKernel+" or later; mounts may work, 'lazyvol attach' does not", "Linux %s is older than %s", release, loopConfigureKernel)
	}
	return fine("Linux %s", release)
}

// fuseFacts are what is known of /dev/fuse.
type fuseFacts struct {
	open error // of opening it
	root bool
}

func examineFuse(context.Context) finding {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err == nil {
		err = unix.Close(fd)
	}
	return judgeFuse(fuseFacts{open: err, root: os.Geteuid() == 0})
}

func judgeFuse(f fuseFacts) finding {
	switch {
	case f.open == nil:
		return fine("/dev/fuse can be opened")
	case errors.Is(f.open, unix.ENOENT), errors.Is(f.open, unix.ENODEV), errors.Is(f.open, unix.ENXIO):
		return fail("run 'modprobe fuse' as root; for a container add --device /dev/fuse --cap-add SYS_ADMIN", "/dev/fuse: %v", f.open)
	case errors.Is(f.open, unix.EACCES) && !f.root:
		return fail("let users open it: 'chmod 666 /dev/fuse' as root (udev's rules of the package fuse3 do so at boot)", "/dev/fuse: %v", f.open)
	case errors.Is(f.open, unix.EPERM), errors.Is(f.open, unix.EACCES):
		return fail("allow the device to the container or the unit: --device /dev/fuse, DeviceAllow=/dev/fuse rw", "/dev/fuse: %v", f.open)
	}
	return fail("see the kernel's log", "/dev/fuse: %v", f.open)
}

// helperFacts are what is known of the program that mounts for ordinary users.
type helperFacts struct {
	root          bool
	missing       error // of looking for it
	path          string
	setuid        bool // and root's
	nosuid        bool // it is on a filesystem that ignores that
	noPrivileges  bool // this process may gain none
	capabilitySet bool // it has CAP_SYS_ADMIN of its own
}

func examineHelper(context.Context) finding {
	f := helperFacts{root: os.Geteuid() == 0}
	if f.path, f.missing = exec.LookPath("fusermount3"); f.missing != nil {
		return judgeHelper(f)
	}
	var st unix.Stat_t
	var vfs unix.Statfs_t
	if err := errors.Join(unix.Stat(f.path, &st), unix.Statfs(f.path, &vfs)); err != nil {
		f.missing = err
		return judgeHelper(f)
	}
	f.setuid = st.Mode&unix.S_ISUID != 0 && st.Uid == 0
	f.nosuid = vfs.Flags&unix.ST_NOSUID != 0
	n, err := unix.Getxattr(f.path, "security.capability", nil)
	f.capabilitySet = err == nil && n > 0
	on, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
	f.noPrivileges = err == nil && on == 1
	return judgeHelper(f)
}

func judgeHelper(f helperFacts) finding {
	switch {
	case f.root && f.missing != nil:
		return skip("root mounts without it, ordinary users could not: it is not installed")
	case f.root && !f.setuid && !f.capabilitySet:
		return skip("root mounts without it, ordinary users could not: %s is not setuid root", f.path)
	case f.root:
		return skip("root mounts without it")
	case f.missing != nil:
		return fail("install the package fuse3", "fusermount3, which mounts for ordinary users: %v", f.missing)
	case !f.setuid && !f.capabilitySet:
		return fail("run 'chown root "+f.path+" && chmod u+s "+f.path+"' as root, or install the package fuse3 again", "%s is not setuid root", f.path)
	case f.nosuid:
		return fail("mount it without nosuid", "%s is on a filesystem mounted with nosuid", f.path)
	case f.noPrivileges:
		return fail("start it without NoNewPrivileges= of systemd, or --security-opt no-new-privileges of a container", "this process may gain no privileges, and so not mount through %s", f.path)
	}
	return fine("%s is setuid root", f.path)
}

// confFacts are what fuse.conf says, and how much of it this user has used.
type confFacts struct {
	root       bool
	missing    bool
	unreadable error
	allowOther bool
	mountMax   int // -1: no limit
	mounts     int // of this user
}

// readFuseConf reads what concerns us. Anything else on a line makes it another
// setting, as fusermount3 has it.
func readFuseConf(data []byte) (allowOther bool, mountMax int) {
	mountMax = defaultMountMax
	for line := range strings.Lines(string(data)) {
		line = strings.TrimSpace(line)
		if line == "user_allow_other" {
			allowOther = true
		}
		if value, ok := strings.CutPrefix(line, "mount_max = "); ok {
			if n, err := strconv.Atoi(value); err == nil {
				mountMax = n
			}
		}
	}
	return allowOther, mountMax
}

func gatherConf() confFacts {
	f := confFacts{root: os.Geteuid() == 0, mountMax: defaultMountMax}
	data, err := os.ReadFile(fuseConf)
	switch {
	case errors.Is(err, os.ErrNotExist):
		f.missing = true
	case err != nil:
		f.unreadable = err
	default:
		f.allowOther, f.mountMax = readFuseConf(data)
	}
	if info, err := os.ReadFile("/proc/self/mountinfo"); err == nil {
		f.mounts = bytes.Count(info, fmt.Appendf(nil, ",user_id=%d,", os.Geteuid()))
	}
	return f
}

func examineAllowOther(context.Context) finding { return judgeAllowOther(gatherConf()) }

func judgeAllowOther(f confFacts) finding {
	switch {
	case f.root:
		return skip("root may use --allow-other without it")
	case f.unreadable != nil:
		return warn("make it readable", "%s: %v", fuseConf, f.unreadable)
	case f.allowOther:
		return fine("%s has user_allow_other", fuseConf)
	}
	return warn("if other users (as qemu's) shall use what you mount, add the line user_allow_other to "+fuseConf, "%s has no user_allow_other: --allow-other fails", fuseConf)
}

// limitFacts are the kernel's limits on FUSE; -1 is one that it does not have.
type limitFacts struct {
	confFacts
	background int // max_user_bgreq
	pages      int // max_pages_limit
}

func examineFuseLimits(context.Context) finding {
	return judgeFuseLimits(limitFacts{
		gatherConf(),
		readNumber("/sys/module/fuse/parameters/max_user_bgreq"), readNumber("/proc/sys/fs/fuse/max_pages_limit"),
	})
}

// readNumber reads a number of the kernel's; -1 if it has none.
func readNumber(path string) int {
	data, err := os.ReadFile(path)
	if err != nil {
		return -1
	}
	n, err := strconv.Atoi(string(bytes.TrimSpace(data)))
	if err != nil {
		return -1
	}
	return n
}

func judgeFuseLimits(f limitFacts) finding {
	wantPages := fs.DefaultMaxWrite / os.Getpagesize()
	switch {
	case !f.root && f.mountMax >= 0 && f.mounts >= f.mountMax:
		return fail("raise mount_max in "+fuseConf+", or unmount some", "you have %d FUSE mounts, and fusermount3 allows %d", f.mounts, f.mountMax)
	case f.pages >= 0 && f.pages < wantPages:
		return warn(fmt.Sprintf("run 'sysctl fs.fuse.max_pages_limit=%d' as root", wantPages), "requests have at most %d pages, and %d are asked for: reads and writes are slower", f.pages, wantPages)
	case !f.root && f.background > 0 && f.background < fs.DefaultMaxBackground: // 0: one that goes by the memory
		return warn(fmt.Sprintf("write %d to /sys/module/fuse/parameters/max_user_bgreq as root", fs.DefaultMaxBackground), "a mount of an ordinary user has at most %d requests under way, and %d are asked for: cold reads are slower", f.background, fs.DefaultMaxBackground)
	}
	return fine("requests of %d pages; %d FUSE mounts of this user", wantPages, f.mounts)
}

// loopFacts are what is known of loop devices.
type loopFacts struct {
	root      bool
	control   error // of opening /dev/loop-control
	configure error // of configuring a device with no file: EBADF if the kernel knows how; nil: there was none to try
	inUse     int
}

func examineLoop(context.Context) finding {
	f := loopFacts{root: os.Geteuid() == 0}
	if !f.root {
		return judgeLoop(f)
	}
	control, err := unix.Open("/dev/loop-control", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err == nil {
		err = unix.Close(control)
	}
	f.control = err
	devices, _ := filepath.Glob("/sys/block/loop*") // the pattern is right
	for _, device := range devices {
		if _, err := os.Stat(filepath.Join(device, "loop")); err == nil {
			f.inUse++
			continue
		}
		if f.configure == nil {
			f.configure = tryConfigure(filepath.Join("/dev", filepath.Base(device)))
		}
	}
	return judgeLoop(f)
}

// tryConfigure asks a free device for what no device can do: its answer tells whether
// the kernel knows the request. nil: the device could not be asked.
func tryConfigure(device string) error {
	fd, err := unix.Open(device, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	err = unix.IoctlLoopConfigure(fd, &unix.LoopConfig{Fd: math.MaxUint32})
	_ = unix.Close(fd) // nothing was written
	return err
}

func judgeLoop(f loopFacts) finding {
	switch {
	case !f.root:
		return skip("only root can attach loop devices; mounts work without")
	case errors.Is(f.control, unix.ENOENT), errors.Is(f.control, unix.ENODEV), errors.Is(f.control, unix.ENXIO):
		return fail("run 'modprobe loop'; for a container run it on the host, and add --device /dev/loop-control", "loop devices are not available: /dev/loop-control: %v", f.control)
	case f.control != nil:
		return fail("allow loop devices to the container or the unit (DeviceAllow=block-loop rw, DeviceAllow=/dev/loop-control rw)", "/dev/loop-control: %v", f.control)
	case errors.Is(f.configure, unix.EINVAL), errors.Is(f.configure, unix.ENOTTY):
		return fail("use a kernel of "+loopConfigureKernel+" or later", "the kernel does not know LOOP_CONFIGURE, which 'lazyvol attach' needs")
	case f.configure == nil:
		return fine("/dev/loop-control can be opened; %d devices are in use, and none was free to try", f.inUse)
	case !errors.Is(f.configure, unix.EBADF) && !errors.Is(f.configure, unix.EBUSY): // the latter: taken just now
		return warn("see whether root lacks a capability (CAP_SYS_ADMIN)", "a free loop device could not be tried: %v", f.configure)
	}
	return fine("LOOP_CONFIGURE works; %d devices are in use", f.inUse)
}

func examineFiles(context.Context) finding {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return warn("see 'ulimit -n'", "the limit on open files: %v", err)
	}
	return judgeFiles(limit.Max) // Go raises the soft limit to the hard one
}

func judgeFiles(limit uint64) finding {
	if limit < enoughFiles {
		return warn("raise it: 'ulimit -Hn 4096' as root, or LimitNOFILE=4096 in the unit", "a process may have %d files open, and a daemon may need %d", limit, enoughFiles)
	}
	return fine("a process may have %d files open", limit)
}

// memoryFacts are in bytes; -1 is not known, or no limit.
type memoryFacts struct {
	wanted    int64 // --memory
	available int64
	limit     int64 // of the cgroup
}

func (a *app) examineMemory(context.Context) finding {
	f := memoryFacts{wanted: int64(a.memory), available: memAvailable(), limit: -1}
	if data, err := os.ReadFile("/proc/self/cgroup"); err == nil {
		f.limit = cgroupLimit("/sys/fs/cgroup", string(data))
	}
	return judgeMemory(f)
}

func judgeMemory(f memoryFacts) finding {
	const lower = "give --memory less (96 MiB is the least)"
	switch {
	case f.limit >= 0 && f.limit < f.wanted:
		return fail("raise the limit (MemoryMax= of the unit, --memory of the container), or "+lower, "the control group has %s, and --memory is %s: daemons would be killed", size(f.limit), size(f.wanted))
	case f.available >= 0 && f.available < f.wanted:
		return warn("stop something, or "+lower, "%s are available, and each daemon takes up to %s", size(f.available), size(f.wanted))
	case f.limit >= 0:
		return fine("each daemon takes up to %s, of %s that the control group may have", size(f.wanted), size(f.limit))
	}
	return fine("each daemon takes up to %s, and %s are available", size(f.wanted), size(f.available))
}

func memAvailable() int64 {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return -1
	}
	defer f.Close() // nothing was written
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		var kib int64
		if n, _ := fmt.Sscanf(lines.Text(), "MemAvailable: %d kB", &kib); n == 1 {
			return kib << 10
		}
	}
	return -1
}

// cgroupLimit returns the least limit on the memory of a process, of its control
// group (cgroups(7), version 2) and of those that this is in; -1 is none.
func cgroupLimit(root, membership string) int64 {
	least := int64(-1)
	for line := range strings.Lines(membership) {
		group, ok := strings.CutPrefix(strings.TrimSpace(line), "0::")
		if !ok {
			continue
		}
		for dir := filepath.Clean("/" + group); ; dir = filepath.Dir(dir) {
			if n := readNumber(filepath.Join(root, dir, "memory.max")); n >= 0 && (least < 0 || int64(n) < least) { // "max" is no number
				least = int64(n)
			}
			if dir == "/" {
				break
			}
		}
	}
	return least
}
