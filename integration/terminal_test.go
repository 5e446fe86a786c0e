package integration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"
)

// A display is what a terminal shows: as much of xterm as lazyvol uses, and nothing
// else, so that whatever it does not know fails the test.
type display struct {
	cols, rows int
	main, alt  [][]rune
	onAlt      bool
	col, row   int
	savedCol   int // of the main buffer
	savedRow   int
	hidden     bool // the cursor
	noWrap     bool
	coloured   bool // something was
	unread     string
	strange    []string
}

func newDisplay(cols, rows int) *display {
	d := &display{}
	d.resize(cols, rows)
	return d
}

func blank(cols, rows int) [][]rune {
	lines := make([][]rune, rows)
	for i := range lines {
		lines[i] = slices.Repeat([]rune{' '}, cols)
	}
	return lines
}

// resize keeps what fits, as xterm does.
func (d *display) resize(cols, rows int) {
	for _, buffer := range []*[][]rune{&d.main, &d.alt} {
		next := blank(cols, rows)
		for i, line := range *buffer {
			if i < rows {
				copy(next[i], line)
			}
		}
		*buffer = next
	}
	d.cols, d.rows = cols, rows
	d.col, d.row = min(d.col, cols-1), min(d.row, rows-1)
}

func (d *display) buffer() [][]rune {
	if d.onAlt {
		return d.alt
	}
	return d.main
}

// lines returns what is shown, without blanks at the ends.
func (d *display) lines() (lines []string) {
	for _, line := range d.buffer() {
		lines = append(lines, strings.TrimRight(string(line), " "))
	}
	return lines
}

// write shows what a program writes.
func (d *display) write(data string) {
	data, d.unread = d.unread+data, ""
	for data != "" {
		if !utf8.FullRuneInString(data) {
			d.unread = data
			return
		}
		r, n := utf8.DecodeRuneInString(data)
		switch {
		case r == '\x1b':
			if n = d.escape(data); n == 0 {
				d.unread = data
				return
			}
		case r == '\r':
			d.col = 0
		case r == '\n':
			d.feed()
		case r < ' ' || r == utf8.RuneError:
			d.strange = append(d.strange, fmt.Sprintf("%q", data[:n]))
		default:
			d.put(r)
		}
		data = data[n:]
	}
}

func (d *display) put(r rune) {
	if d.col == d.cols {
		if d.noWrap {
			d.col--
		} else {
			d.col = 0
			d.feed()
		}
	}
	d.buffer()[d.row][d.col] = r
	d.col++
}

func (d *display) feed() {
	if d.row < d.rows-1 {
		d.row++
		return
	}
	b := d.buffer()
	copy(b, b[1:])
	b[d.rows-1] = slices.Repeat([]rune{' '}, d.cols)
}

// escape obeys the sequence with which data begins, and returns its length; 0: it is
// not all there.
func (d *display) escape(data string) int {
	end := 2
	for ; end < len(data) && data[end] < '@'; end++ {
	}
	if end >= len(data) {
		return 0
	}
	sequence := data[1 : end+1]
	switch sequence {
	case "[?1049h":
		d.savedCol, d.savedRow, d.onAlt = d.col, d.row, true
		d.alt = blank(d.cols, d.rows)
	case "[?1049l":
		d.col, d.row, d.onAlt = d.savedCol, d.savedRow, false
	case "[?25l", "[?25h":
		d.hidden = sequence == "[?25l"
	case "[?7l", "[?7h":
		d.noWrap = sequence == "[?7l"
	case "[H":
		d.col, d.row = 0, 0
	case "[2J":
		d.erase(0, 0, d.rows)
	case "[J":
		d.erase(d.row, d.col, d.rows)
	case "[K":
		d.erase(d.row, d.col, d.row+1)
	default:
		if strings.HasSuffix(sequence, "m") {
			d.coloured = d.coloured || sequence != "[0m"
			break
		}
		d.strange = append(d.strange, fmt.Sprintf("%q", sequence))
	}
	return end + 1
}

// erase empties the lines from row on up to end, the first one from col on.
func (d *display) erase(row, col, end int) {
	for ; row < end; row, col = row+1, 0 {
		line := d.buffer()[row]
		for i := min(col, len(line)); i < len(line); i++ {
			line[i] = ' '
		}
	}
}

// A session is a command that runs on a terminal of its own.
type terminalSession struct {
	t      testing.TB
	cmd    *exec.Cmd
	master *os.File
	slave  *os.File
	before *unix.Termios
	read   sync.WaitGroup

	mu      sync.Mutex // guards the fields below
	display *display
	raw     strings.Builder
}

// onScreen starts lazyvol on a terminal, of which it has stdin, stdout and stderr. The
// caller waits.
func (h *host) onScreen(cols, rows int, env []string, args ...string) *terminalSession {
	h.t.Helper()
	master, slave, err := pty.Open()
	if err != nil {
		h.t.Fatal(err)
	}
	s := &terminalSession{t: h.t, master: master, slave: slave, display: newDisplay(cols, rows)}
	s.setSize(cols, rows)
	if s.before, err = unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS); err != nil {
		h.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	s.cmd = h.command(ctx, args...)
	s.cmd.Env = append(append(s.cmd.Env, "TERM=xterm-256color"), env...)
	s.cmd.Stdin, s.cmd.Stdout, s.cmd.Stderr = slave, slave, slave
	s.cmd.SysProcAttr.Setsid, s.cmd.SysProcAttr.Setctty = true, true
	s.read.Go(s.follow)
	if _, err := io.WriteString(slave, "before\r\n"); err != nil {
		h.t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() {
		cancel()
		_ = s.cmd.Wait() // fails if it was waited for
		_ = slave.Close()
		_ = master.Close()
		s.read.Wait()
	})
	return s
}

func (s *terminalSession) follow() {
	var p [4096]byte
	for {
		n, err := s.master.Read(p[:])
		s.mu.Lock()
		s.raw.Write(p[:n])
		s.display.write(string(p[:n]))
		s.mu.Unlock()
		if err != nil {
			return // EIO: nobody has the terminal any more
		}
	}
}

func (s *terminalSession) setSize(cols, rows int) {
	s.t.Helper()
	if err := pty.Setsize(s.master, &pty.Winsize{Cols: uint16(cols), Rows: uint16(rows)}); err != nil {
		s.t.Fatal(err)
	}
}

// resize makes the terminal another size, as who drags its window does.
func (s *terminalSession) resize(cols, rows int) {
	s.t.Helper()
	s.mu.Lock()
	s.display.resize(cols, rows)
	s.mu.Unlock()
	s.setSize(cols, rows)
}

// see returns what is on the screen.
func (s *terminalSession) see() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Join(s.display.lines(), "\n")
}

// waitSee waits until the screen shows all of want.
func (s *terminalSession) waitSee(want ...string) {
	s.t.Helper()
	const patience = 30 * time.Second
	for end := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		screen, missing := s.see(), ""
		for _, w := range want {
			if !strings.Contains(screen, w) {
				missing = w
			}
		}
		if missing == "" {
			return
		}
		if time.Now().After(end) {
			s.t.Fatalf("the screen does not show %q:\n%s", missing, screen)
		}
	}
}

// press types on the keyboard.
func (s *terminalSession) press(keys string) {
	s.t.Helper()
	if _, err := io.WriteString(s.master, keys); err != nil {
		s.t.Fatal(err)
	}
}

// wait waits until the command has ended, and checks that the terminal is as it was:
// the buffer, the cursor, the keyboard. It returns the exit code, and what is to see.
func (s *terminalSession) wait() (code int, screen string) {
	s.t.Helper()
	err := s.cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		s.t.Fatal(err)
	}
	after, err := unix.IoctlGetTermios(int(s.slave.Fd()), unix.TCGETS)
	if err != nil {
		s.t.Fatal(err)
	}
	// What was written comes before what is written now.
	const mark = "after"
	if _, err := io.WriteString(s.slave, mark); err != nil {
		s.t.Fatal(err)
	}
	s.waitSee(mark)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.display.onAlt || s.display.hidden || s.display.noWrap {
		s.t.Errorf("the terminal is not as it was: other buffer %t, cursor hidden %t, no wrapping %t", s.display.onAlt, s.display.hidden, s.display.noWrap)
	}
	if *after != *s.before {
		s.t.Errorf("the keyboard is not as it was: %+v, and was %+v", after, s.before)
	}
	if len(s.display.strange) > 0 {
		s.t.Errorf("the terminal was sent %v", s.display.strange)
	}
	screen = strings.TrimRight(strings.Join(s.display.lines(), "\n"), "\n")
	screen, ok := strings.CutPrefix(screen, "before")
	if !ok {
		s.t.Errorf("what was there before is gone:\n%s", screen)
	}
	return s.cmd.ProcessState.ExitCode(), strings.TrimPrefix(strings.TrimSuffix(screen, mark), "\n")
}

// written returns all that was written to the terminal.
func (s *terminalSession) written() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.raw.String()
}

// stop stops a process, or lets it go on.
func (m *mount) stop(stopped bool) {
	m.h.t.Helper()
	sig := syscall.SIGCONT
	if stopped {
		sig = syscall.SIGSTOP
	}
	if err := syscall.Kill(m.pid, sig); err != nil {
		m.h.t.Fatalf("%s to the daemon %s: %v", sig, strconv.Itoa(m.pid), err)
	}
}
