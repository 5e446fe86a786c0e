package integration

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The test binary runs three times, one inside the other: as the outside, which
// makes new namespaces for mounts and processes; as their init, which reaps
// daemons, sweeps up at the end and fails the run if there was anything to
// sweep; and as the tests. When the tests time out, crash or are interrupted,
// the kernel ends whatever they started together with the namespaces.
const (
	stageEnv  = "LAZYVOL_TEST_STAGE"
	stageInit = "init"
	stageTest = "test"
)

// exitSandbox is the exit code of a run whose sandbox failed, or in which tests
// left something behind.
const exitSandbox = 3

func TestMain(m *testing.M) {
	var code int
	var err error
	switch os.Getenv(stageEnv) {
	case stageInit:
		code, err = initMain()
	case stageTest:
		code, err = testMain(m)
	default:
		code, err = outsideMain()
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "integration: %v\n", err)
		code = max(code, exitSandbox)
	}
	os.Exit(code)
}

// stage returns the command that runs this binary again.
func stage(name string, attr *syscall.SysProcAttr, env ...string) *exec.Cmd {
	attr.Pdeathsig = syscall.SIGKILL
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(append(os.Environ(), stageEnv+"="+name), env...)
	cmd.SysProcAttr = attr
	return cmd
}

func outsideMain() (int, error) {
	if os.Geteuid() != 0 {
		return 0, errors.New("these tests need root, for mounts and loop devices")
	}
	root, err := os.MkdirTemp("", "lazyvol-test-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(root)                      // init emptied it
	if err := os.Chmod(root, 0o755); err != nil { // one of the hosts is an ordinary user
		return 0, err
	}
	runtime.LockOSThread() // Pdeathsig is about the thread
	cmd := stage(stageInit, &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID}, "TMPDIR="+root)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT)
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("enter the sandbox: %w", err)
	}
	go func() {
		for range signals {
			_ = cmd.Process.Signal(syscall.SIGTERM) // fails only if it has ended
		}
	}()
	var exit *exec.ExitError
	if err := cmd.Wait(); err != nil && !errors.As(err, &exit) {
		return 0, err
	}
	return cmd.ProcessState.ExitCode(), nil
}

func initMain() (int, error) {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return 0, fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return 0, fmt.Errorf("mount /proc: %w", err)
	}
	if err := openFuse(filepath.Join(os.Getenv("TMPDIR"), "fuse")); err != nil {
		return 0, err
	}
	restore, err := dirtyLimits() // which namespaces do not keep from the host
	if err != nil {
		return 0, err
	}
	runtime.LockOSThread()
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	cmd := stage(stageTest, &syscall.SysProcAttr{})
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	go func() {
		for s := range signals {
			if s == syscall.SIGTERM {
				_ = cmd.Process.Signal(syscall.SIGQUIT) // to see where they are; fails only if it has ended
			}
		}
	}()
	code, err := reapUntil(cmd.Process.Pid)
	return code, errors.Join(err, restore(), sweep(os.Getenv("TMPDIR")))
}

// openFuse puts a /dev/fuse in place that any user may open, as distributions
// have it. Minimal systems leave it to root.
func openFuse(node string) error {
	var st unix.Stat_t
	if err := unix.Stat("/dev/fuse", &st); err != nil {
		return fmt.Errorf("look for /dev/fuse: %w", err)
	}
	const anybody = 0o666
	if err := unix.Mknod(node, unix.S_IFCHR|anybody, int(st.Rdev)); err != nil {
		return fmt.Errorf("make a /dev/fuse: %w", err)
	}
	if err := unix.Chmod(node, anybody); err != nil { // whatever the umask
		return fmt.Errorf("make a /dev/fuse: %w", err)
	}
	if err := unix.Mount(node, "/dev/fuse", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount a /dev/fuse: %w", err)
	}
	return nil
}

// reapUntil reaps processes until the one with the given id ended, and returns
// its exit code.
func reapUntil(pid int) (int, error) {
	for {
		var status syscall.WaitStatus
		got, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			return 0, fmt.Errorf("wait for the tests: %w", err)
		case got == pid && status.Signaled():
			return 128 + int(status.Signal()), nil
		case got == pid:
			return status.ExitStatus(), nil
		}
	}
}

// sweep removes what tests left, and returns what that was.
func sweep(root string) error {
	var failed error
	left := func(what string, err error) {
		failed = errors.Join(failed, fmt.Errorf("the tests left %s", what), err)
	}
	devices, err := loopDevicesUnder(root)
	failed = errors.Join(failed, err)
	mounts, err := mountsUnder(root)
	failed = errors.Join(failed, err)
	for _, dir := range slices.Backward(mounts) {
		left("a mount on "+dir, unix.Unmount(dir, unix.MNT_DETACH))
	}
	for device, backing := range devices {
		left(device+", which is attached to "+backing, detachLoop(device))
	}
	running, err := processes()
	failed = errors.Join(failed, err)
	for pid, command := range running {
		left("a process: "+command, syscall.Kill(pid, syscall.SIGKILL))
	}
	return errors.Join(failed, removeTree(root))
}

// removeTree empties the folder of the sandbox. Processes that were just
// killed may hold its mounts a moment longer.
func removeTree(root string) error {
	entries, err := os.ReadDir(root)
	if err != nil {
		return err
	}
	for _, e := range entries {
		err = errors.Join(err, os.RemoveAll(filepath.Join(root, e.Name())))
	}
	return err
}

// mountsUnder lists the mountpoints below dir, outer ones first.
func mountsUnder(dir string) ([]string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var found []string
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if fields := strings.Fields(lines.Text()); len(fields) > 4 && strings.HasPrefix(fields[4], dir+"/") {
			found = append(found, strings.ReplaceAll(fields[4], `\040`, " "))
		}
	}
	return found, lines.Err()
}

// loopDevicesUnder returns the loop devices that are attached to files below
// dir, and the files.
func loopDevicesUnder(dir string) (map[string]string, error) {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	found := make(map[string]string)
	for _, file := range files {
		backing, err := os.ReadFile(file)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ENODEV) {
			continue // detached meanwhile
		}
		if err != nil {
			return nil, err
		}
		if strings.HasPrefix(string(backing), dir+"/") {
			device := filepath.Base(filepath.Dir(filepath.Dir(file)))
			found[filepath.Join("/dev", device)] = strings.TrimSpace(string(backing))
		}
	}
	return found, nil
}

func detachLoop(device string) error {
	f, err := os.Open(device)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0); err != nil && !errors.Is(err, unix.ENXIO) {
		return fmt.Errorf("detach %s: %w", device, err)
	}
	return nil
}

// processes returns the command lines of the sandbox's processes besides init.
// It gives those that are about to end a moment to do so.
func processes() (map[int]string, error) {
	const patience = 2 * time.Second
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		for reaped := true; reaped; {
			pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil)
			reaped = err == nil && pid > 0
		}
		entries, err := os.ReadDir("/proc")
		if err != nil {
			return nil, err
		}
		found := make(map[int]string)
		for _, e := range entries {
			pid, err := strconv.Atoi(e.Name())
			if err != nil || pid == os.Getpid() {
				continue
			}
			if command, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline")); err == nil && len(command) > 0 {
				found[pid] = strings.ReplaceAll(strings.TrimRight(string(command), "\x00"), "\x00", " ")
			}
		}
		if len(found) == 0 || time.Now().After(deadline) {
			return found, nil
		}
	}
}
