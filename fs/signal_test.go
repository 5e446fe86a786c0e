package fs_test

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// runReader is the main function of a reader: it prints its thread, reads 4 KiB
// of the file that is its argument with a single system call, and prints how
// that went. It handles SIGUSR1.
func runReader() {
	runtime.LockOSThread()
	signal.Notify(make(chan os.Signal, 1), unix.SIGUSR1)
	fd, err := unix.Open(os.Args[1], unix.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		fatal(err)
	}
	fmt.Println(unix.Gettid())
	n, err := unix.Pread(fd, make([]byte, 4096), 0)
	fmt.Println(n, err)
	os.Exit(0)
}

// reader is a test's side of a reader.
type reader struct {
	cmd *exec.Cmd
	tid int
	out *bufio.Reader
}

func startReader(t *testing.T, image string) *reader {
	t.Helper()
	r := &reader{cmd: reexec("reader")}
	r.cmd.Args = []string{"fs.test", image}
	stdout, err := r.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	r.out = bufio.NewReader(stdout)
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fscanln(r.out, &r.tid); err != nil {
		t.Fatal(err)
	}
	return r
}

// result waits for the reader and returns what it says.
func (r *reader) result(t *testing.T) string {
	t.Helper()
	line, err := r.out.ReadString('\n')
	if err != nil {
		t.Errorf("reader said nothing: %v", err)
	}
	if err := r.cmd.Wait(); err != nil {
		t.Error(err)
	}
	return strings.TrimSpace(line)
}

// On a disk a read never returns EINTR.
func TestHarmlessSignalDoesNotDisturbARead(t *testing.T) {
	d := start(t, daemonConfig{Size: 1 << 20})
	d.set(Change{Op: "read", Hold: true})
	r := startReader(t, d.image)
	d.waitRunning("read", 1)
	for range 3 {
		if err := unix.Tgkill(r.cmd.Process.Pid, r.tid, unix.SIGUSR1); err != nil {
			t.Fatal(err)
		}
		time.Sleep(100 * time.Millisecond) // two looks at the reader
	}
	if n := d.operation("read").Running; n != 1 {
		t.Errorf("%d reads in the device after the signal", n)
	}
	d.set(Change{Op: "read"})
	if got := r.result(t); got != "4096 <nil>" {
		t.Errorf("read returned %s", got)
	}
}

// A read that waits for the store must not make its process unkillable, also if
// it got a harmless signal before.
func TestKilledReaderIsGoneAtOnce(t *testing.T) {
	d := start(t, daemonConfig{Size: 1 << 20})
	for _, first := range []unix.Signal{0, unix.SIGUSR1} {
		for _, fatal := range []unix.Signal{unix.SIGKILL, unix.SIGTERM} {
			d.set(Change{Op: "read", Hold: true})
			r := startReader(t, d.image)
			d.waitRunning("read", 1)
			if err := unix.Tgkill(r.cmd.Process.Pid, r.tid, first); err != nil {
				t.Fatal(err)
			}
			if err := unix.Kill(r.cmd.Process.Pid, fatal); err != nil {
				t.Fatal(err)
			}
			ended := make(chan string, 1)
			go func() {
				said, _ := r.out.ReadString('\n') // nothing, if it died first
				_ = r.cmd.Wait()                  // of the signal, unless its read ended before its handler
				ended <- said
			}()
			select {
			case said := <-ended:
				if strings.HasPrefix(said, "4096") {
					t.Errorf("the reader read on: %s", said)
				}
			case <-time.After(5 * time.Second):
				t.Errorf("the reader survives signal %d", fatal)
				d.set(Change{Op: "read"})
				<-ended
			}
			d.waitRunning("read", 0)
			d.set(Change{Op: "read"})
		}
	}
}

func TestReadDeadline(t *testing.T) {
	const limit = 200 * time.Millisecond
	d := start(t, daemonConfig{Size: 1 << 20, Options: mountOptions{ReadDeadline: limit}})
	for _, op := range []string{"read", "write", "zero", "seek", "sync"} {
		d.set(Change{Op: op, Hold: true})
	}
	f := d.open(unix.O_RDWR | unix.O_DIRECT)
	for what, do := range map[string]func() error{
		"read":  func() error { _, err := f.ReadAt(make([]byte, 4096), 0); return err },
		"write": func() error { _, err := f.WriteAt(make([]byte, 100), 0); return err },
		"punch": func() error { return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_ZERO_RANGE, 0, 10) },
		"seek":  func() error { _, err := f.Seek(0, unix.SEEK_DATA); return err },
	} {
		began := time.Now()
		wantErrno(t, what, do(), unix.EIO)
		if took := time.Since(began); took < limit || took > 50*limit {
			t.Errorf("%s failed after %v, not %v", what, took, limit)
		}
	}
	synced := make(chan error)
	go func() { synced <- f.Sync() }()
	d.waitRunning("sync", 1)
	time.Sleep(2 * limit)
	d.set(Change{Op: "sync"})
	if err := <-synced; err != nil {
		t.Errorf("fsync has a deadline: %v", err)
	}
}
