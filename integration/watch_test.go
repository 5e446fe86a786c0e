package integration

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// watched makes what there is to see: a volume that hydrates slowly and has dirty data,
// and a snapshot that is hydrated.
func watched(h *host) (hydrating, hydrated *mount, vol, snap string) {
	h.t.Helper()
	snap = h.ok("snapshot", "create", h.image(randomBytes(1, mib)))
	hydrated = h.mount(snap)
	hydrated.waitState("hydrated", 30*time.Second)
	// Packs of 16 MiB at this rate: the first comes at once, the next in minutes.
	vol = h.ok("volume", "create", "--snapshot", h.ok("snapshot", "create", h.image(randomBytes(2, 48*mib))))
	hydrating = h.mount(vol, "--hydrate-rate", "100KiB")
	waitFor(h.t, "something is hydrated", 30*time.Second, func() bool { return hydrating.status().HydratedBytes > 0 })
	hydrating.write(randomBytes(3, 64*kib), 40*mib)
	return hydrating, hydrated, vol, snap
}

func TestWatchIsALiveScreen(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	hydrating, hydrated, vol, snap := watched(h)
	idle := h.ok("volume", "create", "--size", "1GiB")

	s := h.onScreen(80, 24, nil, "status", "--watch", "--interval", "100ms")
	s.waitSee("2 of 3 mounted", "q ends", vol+"  hydrating  48 MiB", "/"+filepath.Base(hydrating.dir), "█", " of 48 MiB", "dirty 64 KiB",
		snap+"  hydrated  1.0 MiB", "100%", idle+"  not mounted", "What is dirty exists on this host only", "hydrated ")
	if !s.display.onAlt || !s.display.hidden {
		t.Error("it does not have the terminal to itself")
	}
	hydrating.write(randomBytes(4, 64*kib), 42*mib)
	s.waitSee("dirty 128 KiB +")

	s.resize(40, 10)
	s.waitSee(vol+"  hydrating", "██", "33%", snap+" 100% hydrated", idle+"     - unmounted", "What is dirty")
	for line := range strings.SplitSeq(s.see(), "\n") {
		if n := utf8.RuneCountInString(line); n > 40 {
			t.Errorf("%q has %d columns", line, n)
		}
	}
	s.resize(100, 30)
	s.waitSee(vol+"  hydrating", "/"+filepath.Base(hydrated.dir), "q ends")

	// One that hangs holds up nobody: the others' figures go on changing.
	hydrated.stop(true)
	s.waitSee(snap+"  not answering", "1 in trouble", "error: no answer for")
	hydrating.write(randomBytes(5, 64*kib), 44*mib)
	s.waitSee("dirty 192 KiB")
	hydrated.stop(false)
	s.waitSee(snap + "  hydrated")

	hydrated.unmount()
	s.waitSee("1 of 2 mounted")
	s.press("xq")
	if code, screen := s.wait(); code != 0 || screen != "" {
		t.Errorf("q: exit code %d, and left on the screen:\n%s", code, screen)
	}
	if !s.display.coloured {
		t.Error("it has no colours")
	}
}

func TestWatchLeavesTheTerminalAsItWas(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	_, _, vol, snap := watched(h)

	s := h.onScreen(80, 24, []string{"NO_COLOR=1"}, "status", "-w", vol)
	s.waitSee(vol, "hydrating")
	if strings.Contains(s.see(), snap) {
		t.Errorf("%s was not asked for:\n%s", snap, s.see())
	}
	s.press("\x03") // Ctrl-C
	if code, screen := s.wait(); code != 0 || screen != "" || s.display.coloured {
		t.Errorf("Ctrl-C: exit code %d, colours %t, and left on the screen:\n%s", code, s.display.coloured, screen)
	}

	// It follows the terminal's size without waiting for a sample, and comes back after
	// Ctrl-Z.
	s = h.onScreen(80, 24, nil, "status", "--watch", "--interval", "1h")
	s.waitSee(vol + "  hydrating  48 MiB")
	s.resize(60, 5)
	s.waitSee("  "+snap+" 100% hydrated", "33% hydrating")
	s.press("\x1a")
	if err := unix.Waitid(unix.P_PID, s.cmd.Process.Pid, nil, unix.WSTOPPED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	s.waitSee("before") // the other buffer
	s.resize(80, 24)
	if err := s.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	s.waitSee(vol + "  hydrating  48 MiB")
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if code, screen := s.wait(); code != 0 || screen != "" {
		t.Errorf("SIGTERM: exit code %d, and left on the screen:\n%s", code, screen)
	}

	// An error in the middle of it is seen after it.
	h.ok("unmount", vol)
	s = h.onScreen(80, 24, nil, "status", "--watch", "--interval", "100ms")
	s.waitSee(vol, "not mounted")
	volumes := filepath.Join(h.state, "volumes")
	if err := os.Rename(volumes, volumes+".away"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(volumes, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	code, screen := s.wait()
	if code != 1 || !strings.HasPrefix(screen, "lazyvol: ") || !strings.Contains(strings.ReplaceAll(screen, "\n", ""), "not a directory") {
		t.Errorf("an error: exit code %d, and left on the screen:\n%s", code, screen)
	}
}

// Where there is no terminal, or none that can do more than print, no sequence is sent
// to it.
func TestWatchPrintsLinesWhereItCanOnlyPrint(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	hydrating, _, vol, snap := watched(h)
	out := h.firstLines(8, "status", "--watch", "--interval", "100ms")
	if n := strings.Count(out, vol+"  hydrating"); n < 2 || strings.Count(out, snap+"  hydrated  100%") < 2 || !strings.Contains(out, "on "+hydrating.dir) {
		t.Errorf("%d samples of the volume:\n%s", n, out)
	}
	for line := range strings.Lines(h.firstLines(3, "status", "--watch", "--json", "--interval", "100ms")) {
		all := parse[struct {
			Time    time.Time
			Volumes []status
		}](t, line)
		if len(all.Volumes) != 2 || all.Volumes[0].ID != vol || all.Volumes[0].State != "hydrating" || all.Volumes[0].DirtyBytes != 64*kib || time.Since(all.Time) > time.Minute {
			t.Errorf("a line: %s", line)
		}
	}

	s := h.onScreen(80, 24, []string{"TERM=dumb"}, "status", "--watch", "--interval", "100ms", hydrating.dir)
	s.waitSee(vol + "  hydrating")
	s.press("\x03")
	// The terminal itself echoes the key.
	if err := s.cmd.Wait(); err != nil || strings.Contains(s.written(), "\x1b") {
		t.Errorf("TERM=dumb: %v\n%q", err, s.written())
	}

	for _, args := range [][]string{
		{"status", "--watch", "--interval", "1ms"}, {"status", "--interval", "2s"}, {"status", "--watch", "vol-1"},
	} {
		h.fails(2, nil, args...)
	}
	h.fails(3, nil, "status", "--watch", "vol-00000000000000001")
	h.fails(3, nil, "status", "--watch", h.dir)
}

// firstLines returns what a command that goes on for ever prints into a pipe, so many
// lines at least, until it is interrupted.
func (h *host) firstLines(n int, args ...string) string {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	cmd := h.command(ctx, args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		h.t.Fatal(err)
	}
	var got strings.Builder
	for lines := bufio.NewScanner(out); lines.Scan(); n-- {
		got.WriteString(lines.Text() + "\n")
		if n == 1 {
			if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
				h.t.Fatal(err)
			}
		}
	}
	if err := cmd.Wait(); err != nil || stderr.Len() > 0 || strings.Contains(got.String(), "\x1b") {
		h.t.Errorf("%q: %v, on stderr %q, on stdout\n%s\nwant exit 0 and no escape sequences", args, err, stderr.String(), got.String())
	}
	return got.String()
}

// A longCommand is one that shows how far it is.
type longCommand struct {
	operation string
	args      []string
	id        string        // that its last line has; "-": what it prints
	before    func() string // what the command is about, appended to args
}

func longCommands(h *host) []longCommand {
	disk := randomBytes(1, 8*mib)
	image := h.image(disk)
	snap := h.ok("snapshot", "create", image)
	device := loopDevice(h.t, writeImage(h.t, filepath.Join(h.dir, "device.img"), disk))
	target := loopDevice(h.t, sparse(h.t, filepath.Join(h.dir, "target.img"), 8*mib))
	other := newDirStore(h.t)
	serial := 0
	seed := func() uint64 { serial++; return uint64(100 + serial) }
	volume := func() string { return h.ok("volume", "create", "--snapshot", snap) }
	mounted := func(flags ...string) *mount {
		m := h.mount(volume(), flags...)
		m.write(randomBytes(seed(), mib), 4*mib)
		return m
	}
	set := []string{mounted().status().ID, volume()}
	dirty := mounted().status().ID
	return []longCommand{
		{"snapshot create", []string{"snapshot", "create", image}, "-", nil},
		{"snapshot create", []string{"snapshot", "create", device}, "-", nil},
		{"snapshot create", []string{"snapshot", "create", "--parent", snap, image}, "-", nil},
		{"snapshot create", []string{"snapshot", "create", dirty}, "-", nil},
		{"snapshot create", []string{"snapshot", "create"}, "-", volume},
		{"snapshot create", append([]string{"snapshot", "create"}, set...), "set-", nil},
		{"snapshot export", []string{"snapshot", "export", snap}, snap, func() string { return filepath.Join(h.dir, fmt.Sprint("export", seed())) }},
		{"snapshot export", []string{"snapshot", "export", "--force", snap, target}, snap, nil},
		{"snapshot copy", []string{"snapshot", "copy", snap, "--to", other.url}, snap, nil},
		{"snapshot verify", []string{"snapshot", "verify", snap}, snap, nil},
		{"snapshot verify", []string{"snapshot", "verify", "--all", "--repair"}, "", nil},
		{"hydrate", []string{"hydrate"}, "vol-", volume},
		{"hydrate", []string{"hydrate", "--wait"}, "vol-", func() string { return mounted("--no-hydrate").status().ID }},
		{"snapshot delete", []string{"snapshot", "delete"}, "", func() string { return h.ok("snapshot", "create", h.image(randomBytes(seed(), mib))) }},
		{"snapshot prune", []string{"snapshot", "prune", "--keep-last", "1", "--tag"}, "", func() string {
			tag := fmt.Sprintf("t=%d", seed())
			for range 2 {
				h.ok("snapshot", "create", "--tag", tag, "--parent", snap, image)
			}
			return tag
		}},
		{"snapshot tree", []string{"snapshot", "tree", "--unique"}, "", nil},
		{"gc", []string{"gc"}, "", nil},
	}
}

// Each draws a bar on a terminal, or what turns if nobody knows how much there is, and
// leaves nothing of it; where there is none it says nothing; and tools get lines.
func TestLongCommandsShowHowFarTheyAre(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	for _, c := range longCommands(h) {
		t.Run(strings.Join(c.args[:min(len(c.args), 3)], " "), func(t *testing.T) {
			h := h.in(t)
			args := func(flags ...string) []string {
				args := append(flags, c.args...)
				if c.before != nil {
					args = append(args, c.before())
				}
				return args
			}
			s := h.onScreen(80, 60, nil, args()...)
			code, screen := s.wait()
			if code != 0 || !strings.Contains(s.written(), "\r\x1b[K"+c.operation+"  ") {
				t.Errorf("on a terminal: exit code %d, and it has written %q", code, s.written())
			}
			if strings.ContainsAny(screen, "█░%") {
				t.Errorf("something of a bar is left:\n%s", screen)
			}
			r := h.run(args()...)
			if r.code != 0 || strings.ContainsAny(r.stdout+r.stderr, "\x1b█\r") {
				t.Errorf("%s\nwant exit 0, and no bar", r)
			}
			r = h.run(args("--progress", "json")...)
			lines := progressOf(t, r.stderr)
			if r.code != 0 || len(lines) == 0 {
				t.Fatalf("%s\nwant exit 0, and lines of JSON", r)
			}
			last := lines[len(lines)-1]
			if !last.Done || last.Operation != c.operation || last.DoneBytes < 0 || last.TotalBytes != nil && *last.TotalBytes != last.DoneBytes {
				t.Errorf("the last line is %+v", last)
			}
			id := c.id
			if id == "-" {
				id = strings.TrimSpace(r.stdout)
			}
			if !strings.HasPrefix(last.Id, id) || id == "" && last.Id != "" {
				t.Errorf("its id is %q, want %q", last.Id, id)
			}
			for _, l := range lines[:len(lines)-1] {
				if l.Done {
					t.Errorf("a line before the last one says that it is done: %+v", l)
				}
			}
		})
	}
}

// progressInfo is what a line of --progress json says.
type progressInfo struct {
	Operation      string
	Id             string
	DoneBytes      int64
	TotalBytes     *int64
	BytesPerSecond int64
	EtaSeconds     *int64
	Done           bool
}

// progressOf returns the lines of progress on stderr.
func progressOf(t testing.TB, stderr string) (lines []progressInfo) {
	t.Helper()
	for line := range strings.Lines(stderr) {
		if strings.HasPrefix(line, `{"Progress":`) {
			lines = append(lines, parse[struct{ Progress progressInfo }](t, line).Progress)
		}
	}
	return lines
}

// A command that goes on in the background has a terminal only until it does, and draws
// nothing into its log.
func TestBackgroundCommandsDrawNoBar(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	for _, source := range []string{h.image(randomBytes(1, 8*mib)), h.ok("volume", "create", "--size", "8MiB")} {
		s := h.onScreen(80, 24, nil, "--progress", "bar", "snapshot", "create", "--no-wait", source)
		code, screen := s.wait()
		if code != 0 || !strings.HasPrefix(screen, "snap-") || strings.Contains(s.written(), "\x1b") {
			t.Errorf("exit code %d, and it has written %q", code, s.written())
		}
		snap := strings.TrimSpace(screen)
		waitFor(t, "the snapshot is completed", 30*time.Second, func() bool { return h.show(snap).State == "completed" })
		log, err := os.ReadFile(filepath.Join(h.state, map[bool]string{true: filepath.Join("volumes", source), false: ""}[strings.HasPrefix(source, "vol-")], "daemon.log"))
		if err != nil || strings.Contains(string(log), "\x1b") {
			t.Errorf("the log of %s: %q, %v", source, log, err)
		}
	}
}

// What fails leaves no bar before its error, and tools are told that it was not done.
func TestFailuresAreToldAfterTheBar(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	snap := h.ok("snapshot", "create", h.image(randomBytes(1, 8*mib)))
	h.store.damaged()
	for key, size := range h.store.objects(t, filepath.Join("data", snap, "packs")) {
		if err := os.Truncate(filepath.Join(h.store.files, key), size/2); err != nil {
			t.Fatal(err)
		}
	}
	for _, args := range [][]string{{"snapshot", "export", snap, filepath.Join(h.dir, "out.img")}, {"snapshot", "copy", snap, "--to", newDirStore(t).url}} {
		s := h.onScreen(80, 24, nil, args...)
		code, screen := s.wait()
		if code != 1 || !strings.HasPrefix(screen, "lazyvol: "+args[1]+" "+snap) || strings.ContainsAny(screen, "█░") || !strings.Contains(s.written(), "\r\x1b[K"+strings.Join(args[:2], " ")+"  ") {
			t.Errorf("on a terminal: exit code %d, and left on the screen:\n%s", code, screen)
		}
		r := h.run(append([]string{"--json", "--progress", "json"}, args...)...)
		lines := strings.Split(strings.TrimSpace(r.stderr), "\n")
		progress := progressOf(t, r.stderr)
		if r.code != 1 || len(progress) != len(lines)-1 || progress[len(progress)-1].Done {
			t.Fatalf("%s\nwant lines of progress that end undone, and then the error", r)
		}
		if e := parse[struct {
			Error struct{ Code, Message string }
		}](t, lines[len(lines)-1]); e.Error.Message == "" {
			t.Errorf("the last line is no error: %s", lines[len(lines)-1])
		}
	}
}
