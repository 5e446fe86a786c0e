package integration

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

const unitsDir = "../packaging/systemd"

// units returns systemd's units by name, with the binary that is tested.
func (h *host) units() (dir string, units map[string]string) {
	h.t.Helper()
	dir, units = h.t.TempDir(), make(map[string]string)
	for _, pattern := range []string{"*.service", "*.timer", "examples/*.mount"} {
		files, err := filepath.Glob(filepath.Join(unitsDir, pattern))
		if err != nil || len(files) == 0 {
			h.t.Fatalf("no %s in %s: %v", pattern, unitsDir, err)
		}
		for _, file := range files {
			data, err := os.ReadFile(file)
			if err != nil {
				h.t.Fatal(err)
			}
			unit := strings.ReplaceAll(string(data), "/usr/bin/lazyvol", h.binary)
			units[filepath.Base(file)] = unit
			if err := os.WriteFile(filepath.Join(dir, filepath.Base(file)), []byte(unit), 0o644); err != nil {
				h.t.Fatal(err)
			}
		}
	}
	return dir, units
}

func TestUnitsAreWhatSystemdUnderstands(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	dir, units := h.units()
	for name := range units {
		out, err := exec.Command("systemd-analyze", "verify", "--man=no", "--recursive-errors=yes", filepath.Join(dir, name)).CombinedOutput()
		if err != nil || len(out) > 0 {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
}

// Each of these gives a service mounts of its own: what it mounts then, nobody else
// sees. The same of devices: loop devices would be out of reach.
var hidesMounts = regexp.MustCompile(`(?m)^(Protect(System|Home|KernelTunables|KernelModules|KernelLogs|ControlGroups|Proc|Hostname|Clock)|ProcSubset|Private(Tmp|Devices|Mounts|Users|PIDs)|` +
	`Bind(ReadOnly)?Paths|TemporaryFileSystem|(ReadOnly|ReadWrite|Inaccessible|NoExec|Exec)Paths|MountFlags|MountAPIVFS|Root(Directory|Image)|DynamicUser|Device(Policy|Allow))=`)

func TestUnitsHideNoMounts(t *testing.T) {
	t.Parallel()
	_, units := newHost(t, nil).units()
	for name, unit := range units {
		if found := hidesMounts.FindString(unit); found != "" {
			t.Errorf("%s has %s", name, found)
		}
	}
}

// setting returns the value of the last line of a unit that sets name.
func setting(t testing.TB, unit, name string) string {
	t.Helper()
	found := regexp.MustCompile(`(?m)^`+name+`=(.*)$`).FindAllStringSubmatch(unit, -1)
	if len(found) == 0 {
		t.Fatalf("no %s in\n%s", name, unit)
	}
	return found[len(found)-1][1]
}

// arguments returns what a unit's command line is for a volume, after the binary.
func arguments(t testing.TB, line, instance string, variables map[string]string) []string {
	t.Helper()
	var args []string
	for _, word := range strings.Fields(line)[1:] {
		if name, ok := strings.CutPrefix(word, "$"); ok {
			value, known := variables[name]
			if !known {
				t.Fatalf("the unit does not say what %s is", word)
			}
			args = append(args, strings.Fields(value)...)
			continue
		}
		args = append(args, strings.ReplaceAll(word, "%i", instance))
	}
	return args
}

// The service does its work with what it is left of root's powers.
func TestAttachServiceHasTheCapabilitiesThatItNeeds(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	_, units := h.units()
	unit := units["lazyvol-attach@.service"]
	bounds := "-all"
	for capability := range strings.FieldsSeq(setting(t, unit, "CapabilityBoundingSet")) {
		bounds += ",+" + strings.ToLower(strings.TrimPrefix(capability, "CAP_"))
	}
	vol, dir := h.newMountable("ext4"), h.mountDir()
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	args := arguments(t, setting(t, unit, "ExecStart"), vol, map[string]string{"LAZYVOL_ATTACH_FLAGS": "--mount " + dir})
	cmd := h.command(ctx, args...)
	cmd.Path, cmd.Args = "/usr/bin/setpriv", slices.Concat([]string{"setpriv", "--no-new-privs", "--bounding-set", bounds, h.binary}, args)
	var log strings.Builder
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	mounted := func() bool { return isMountpoint(t, dir) || len(ended) > 0 }
	waitFor(t, "it is mounted", commandTimeout, mounted)
	if len(ended) == 0 {
		waitFor(t, "it is attached", commandTimeout, func() bool { return h.run("attach", vol).code == 0 })
		keep(t, dir, "file", []byte("kept"))
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Error(err)
		}
	}
	if err := <-ended; err != nil {
		t.Errorf("%v\n%s", err, log.String())
	}
	h.ok("attach", "--mount", dir, vol)
	wantFile(t, dir, "file", []byte("kept"))
	h.ok("detach", vol)
	h.wantNothingAttached()
}

// The timer's service snapshots a volume in use, and keeps what it is told to.
func TestSnapshotServiceSnapshotsAndPrunes(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	_, units := h.units()
	unit := units["lazyvol-snapshot@.service"]
	vol := h.newMountable("ext4")
	_, dir := h.attachMount(vol)
	other := h.ok("snapshot", "create", "--tag", "timer=vol-00000000000000001", h.image(randomBytes(1, mib)))
	commands := regexp.MustCompile(`(?m)^ExecStart=(.*)$`).FindAllStringSubmatch(unit, -1)
	for round := range 4 {
		keep(t, dir, "round", []byte{byte(round)})
		for _, c := range commands {
			h.ok(arguments(t, c[1], vol, map[string]string{"LAZYVOL_KEEP": "--keep-last 2"})...)
		}
	}
	var of []string
	for _, s := range h.list() {
		if s.SnapshotId != other {
			of = append(of, s.SnapshotId)
		}
	}
	if len(of) != 2 || len(h.list()) != 3 {
		t.Fatalf("left are %+v", h.list())
	}
	_, last := h.attachMount(of[1])
	wantFile(t, last, "round", []byte{3}) // though nothing was replayed: it was frozen
	h.ok("detach", last)
	h.ok("detach", dir)
}

// A supervisor is what systemd is to a service: a socket that it reports to.
type supervisor struct {
	t    *testing.T
	conn *net.UnixConn
	env  []string
}

func newSupervisor(t *testing.T, dir string, watchdog time.Duration) *supervisor {
	t.Helper()
	path := filepath.Join(dir, "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return &supervisor{t, conn, []string{"NOTIFY_SOCKET=" + path, fmt.Sprintf("WATCHDOG_USEC=%d", watchdog.Microseconds())}}
}

// next returns the lines of the next message, nil if none comes in time.
func (s *supervisor) next(within time.Duration) []string {
	s.t.Helper()
	if err := s.conn.SetReadDeadline(time.Now().Add(within)); err != nil {
		s.t.Fatal(err)
	}
	message := make([]byte, 4096)
	n, err := s.conn.Read(message)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return strings.Split(string(message[:n]), "\n")
}

// wait waits for a message with a line, and returns the message.
func (s *supervisor) wait(line string) []string {
	s.t.Helper()
	for {
		lines := s.next(commandTimeout)
		if lines == nil {
			s.t.Fatalf("no %s", line)
		}
		if slices.Contains(lines, line) {
			return lines
		}
	}
}

const watchdog = "WATCHDOG=1"

func TestDaemonTellsItsSupervisorHowItIs(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	vol := h.newMountable("ext4")
	dir := h.mountDir()
	const interval = time.Second
	s := newSupervisor(t, h.dir, interval)
	supervised := h.in(t)
	supervised.env = append(supervised.env, s.env...)

	daemon := supervised.begin("attach", "--foreground", "--mount", dir, vol)
	first := s.wait("READY=1")
	if !isMountpoint(t, dir) {
		t.Error("ready, and nothing is mounted")
	}
	keep(t, dir, "file", []byte("kept"))
	text := strings.Join(first, "\n")
	if !slices.Contains(first, fmt.Sprintf("MAINPID=%d", daemon.cmd.Process.Pid)) || !strings.Contains(text, "STATUS="+vol+" on /dev/loop") || !strings.Contains(text, dir) {
		t.Errorf("it was ready with %q", first)
	}

	begin := time.Now()
	for range 3 {
		s.wait(watchdog)
	}
	if took := time.Since(begin); took < interval {
		t.Errorf("three times within %s, where two a second are wanted", took)
	}

	daemon.signal(syscall.SIGSTOP)
	s.next(interval) // perhaps on its way
	if lines := s.next(2 * interval); lines != nil {
		t.Errorf("stopped, it says %q", lines)
	}
	daemon.signal(syscall.SIGCONT)
	s.wait(watchdog)

	f, err := os.Create(filepath.Join(dir, "busy"))
	if err != nil {
		t.Fatal(err)
	}
	daemon.signal(syscall.SIGTERM)
	s.wait("STOPPING=1")
	fuse := filepath.Join(h.state, "attached", vol)
	waitFor(t, "it is out of sight", commandTimeout, func() bool { return !isMountpoint(t, fuse) })
	if _, err := f.WriteString("served"); err != nil {
		t.Error(err)
	}
	if err := f.Sync(); err != nil {
		t.Error(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	umount(t, dir)
	if r := daemon.wait(); r.code != 0 {
		t.Error(r)
	}
	h.wantNothingAttached()

	daemon = supervised.begin("mount", "--foreground", vol, dir)
	s.wait("READY=1")
	m := h.mounted(dir)
	s.wait(watchdog)
	h.ok("unmount", dir)
	s.wait("STOPPING=1")
	if r := daemon.wait(); r.code != 0 {
		t.Error(r)
	}
	m.waitEnd()

	// In the background nobody supervises it, whoever supervises what started it.
	supervised.ok("attach", "--mount", dir, vol)
	supervised.ok("detach", dir)
	if lines := s.next(interval); lines != nil {
		t.Errorf("in the background it says %q", lines)
	}
	h.wantNothingAttached()
}

// That the store is away is no reason to start the daemon anew: it would wait as
// long, and nobody could use the mount meanwhile.
func TestDaemonThatWaitsForTheStoreIsAlive(t *testing.T) {
	t.Parallel()
	store, gate := newGatedStore(t)
	h := newHost(t, store)
	disk := randomBytes(1, 64*mib)
	snap := h.ok("snapshot", "create", h.image(disk))
	const interval = time.Second
	s := newSupervisor(t, h.dir, interval)
	h.env = append(h.env, s.env...)
	dir := h.mountDir()
	daemon := h.begin("mount", "--foreground", "--no-hydrate", "--read-deadline=10m", snap, dir)
	s.wait("READY=1")
	gate.close(requests, gets("packs"))
	defer gate.open()
	f := openDirect(t, filepath.Join(dir, "volume.img"), os.O_RDONLY)
	read := make(chan error, 96)
	for i := range cap(read) {
		go func() {
			_, err := f.ReadAt(aligned(pageSize), int64(i)*blockSize)
			read <- err
		}()
	}
	gate.waitHolding(t)
	for range 4 {
		s.wait(watchdog)
	}
	gate.open()
	for range cap(read) {
		if err := <-read; err != nil {
			t.Error(err)
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	daemon.signal(syscall.SIGTERM)
	if r := daemon.wait(); r.code != 0 {
		t.Error(r)
	}
}
