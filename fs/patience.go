package fs

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// interruptPoll is how often a request whose caller was signalled looks at what
// the caller is asked to do. It bounds how long kill takes on a stuck read.
const interruptPoll = 50 * time.Millisecond

// patience is the context of one request: it ends when the caller is asked to
// end, the connection is gone, or the time is up.
//
// The kernel sends INTERRUPT for every signal that reaches a waiting caller,
// and passes on an EINTR even if the signal's handler asked for restarts. On a
// disk neither read nor fsync ever returns EINTR, and many programs take it for
// a failure; any profiler or interval timer would bring it about. So an
// interrupted request goes on unless the signal asks the caller to end.
//
// Nearly all requests are served without waiting, so the timer and the watching
// goroutine exist only after the first call of Done.
type patience struct {
	interrupted <-chan struct{} // closed by INTERRUPT, or when the connection is gone
	connected   func() bool
	tid         uint32 // the caller's thread; 0 if it has no number here
	deadline    time.Time

	mu      sync.Mutex // guards what follows
	waited  context.Context
	cancel  context.CancelFunc
	watcher chan struct{} // closed when watch has returned
	over    bool
}

var _ context.Context = (*patience)(nil)

// Deadline returns when the time is up. Without a limit there is none.
func (p *patience) Deadline() (time.Time, bool) { return p.deadline, !p.deadline.IsZero() }

// Value returns nil: what a Device does for a caller does not depend on who it is.
func (p *patience) Value(any) any { return nil }

// Done returns a channel that is closed when the request may be given up.
func (p *patience) Done() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.waited == nil {
		if p.deadline.IsZero() {
			p.waited, p.cancel = context.WithCancel(context.Background())
		} else {
			p.waited, p.cancel = context.WithDeadline(context.Background(), p.deadline)
		}
		if p.over {
			p.cancel()
		} else {
			p.watcher = make(chan struct{})
			go p.watch(p.waited, p.cancel)
		}
	}
	return p.waited.Done()
}

// Err returns why Done is closed, nil while it is not. Before the first call of
// Done nothing watches the caller: someone who polls Err in place of waiting
// sees the time run out, but no signal.
func (p *patience) Err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.waited != nil:
		return p.waited.Err()
	case p.over:
		return context.Canceled
	case !p.deadline.IsZero() && time.Now().After(p.deadline):
		return context.DeadlineExceeded
	}
	return nil
}

// end is called when the request was answered. It returns when the watcher has.
func (p *patience) end() {
	p.mu.Lock()
	p.over = true
	watcher, cancel := p.watcher, p.cancel
	p.mu.Unlock()
	if watcher != nil {
		cancel()
		<-watcher
	}
}

// watch cancels waited when the caller was interrupted and is to end.
func (p *patience) watch(waited context.Context, cancel context.CancelFunc) {
	defer close(p.watcher)
	select {
	case <-waited.Done():
		return
	case <-p.interrupted:
	}
	tick := time.NewTicker(interruptPoll)
	defer tick.Stop()
	for p.connected() && !ending(p.tid) {
		select {
		case <-waited.Done():
			return
		case <-tick.C:
		}
	}
	cancel()
}

// endSignals are those that ask a process to end, whether it handles them or
// not. Any other that is fatal to a process the kernel turns into a pending
// SIGKILL of each of its threads (complete_signal in kernel/signal.c).
const endSignals = 1<<(unix.SIGKILL-1) | 1<<(unix.SIGTERM-1) | 1<<(unix.SIGINT-1) | 1<<(unix.SIGQUIT-1) | 1<<(unix.SIGHUP-1)

// ending reports whether a thread is about to get one of endSignals, or is
// gone, or cannot be looked at.
func ending(tid uint32) bool {
	if tid == 0 {
		return true
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", tid))
	if err != nil {
		return true
	}
	pending := signalSet(status, "SigPnd") | signalSet(status, "ShdPnd")
	return pending&^signalSet(status, "SigBlk")&endSignals != 0
}

// signalSet returns a set of signals from a /proc/PID/status file (see
// proc_pid_status(5)); bit 0 is signal 1.
func signalSet(status []byte, name string) uint64 {
	for line := range bytes.Lines(status) {
		if value, ok := bytes.CutPrefix(line, []byte(name+":")); ok {
			set, err := strconv.ParseUint(string(bytes.TrimSpace(value)), 16, 64)
			if err != nil {
				return 0 // no kernel writes that
			}
			return set
		}
	}
	return 0
}

// alive reports whether the kernel still serves a FUSE connection: it reports
// an error on the device as soon as the mount is gone or was aborted.
func alive(conn *os.File) bool {
	fds := []unix.PollFd{{Fd: int32(conn.Fd()), Events: unix.POLLOUT}}
	_, err := unix.Poll(fds, 0)
	return err == nil && fds[0].Revents&unix.POLLERR == 0
}
