package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// What a screen tells a terminal: xterm's sequences, which all of today's know. Without
// wrapping, a line that is wider than it seems loses its end instead of pushing down
// the others.
const (
	enterScreen = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[H\x1b[2J" // the other buffer, no cursor, no wrapping
	leaveScreen = "\x1b[?7h\x1b[?25h\x1b[?1049l"
	goHome      = "\x1b[H"
	eraseToEnd  = "\x1b[K" // of the line
	eraseBelow  = "\x1b[J"
)

// errQuit is the cause of the end of a screen that its user ended.
var errQuit = errors.New("quit")

// A screen is a whole terminal that shows one picture, until its user has seen enough.
type screen struct {
	out   *os.File
	in    *os.File // the keyboard; nil: there is none
	saved *unix.Termios
}

// enter takes the terminal. What leave undoes is undone if it fails.
func (s *screen) enter() error {
	if s.in != nil {
		fd := int(s.in.Fd())
		was, err := unix.IoctlGetTermios(fd, unix.TCGETS)
		if err != nil {
			return fmt.Errorf("take the terminal: %w", err)
		}
		keys := *was
		keys.Lflag &^= unix.ICANON | unix.ECHO // each key at once; Ctrl-C still is a signal
		keys.Cc[unix.VMIN], keys.Cc[unix.VTIME] = 1, 0
		if err := unix.IoctlSetTermios(fd, unix.TCSETS, &keys); err != nil {
			return fmt.Errorf("take the terminal: %w", err)
		}
		s.saved = was
	}
	if _, err := io.WriteString(s.out, enterScreen); err != nil {
		return errors.Join(fmt.Errorf("take the terminal: %w", err), s.leave())
	}
	return nil
}

// leave gives the terminal back as it was.
func (s *screen) leave() error {
	_, err := io.WriteString(s.out, leaveScreen)
	if s.saved != nil {
		err = errors.Join(err, unix.IoctlSetTermios(int(s.in.Fd()), unix.TCSETSF, s.saved)) // keys not read are nobody's
	}
	if err != nil {
		return fmt.Errorf("give the terminal back: %w", err)
	}
	return nil
}

// draw shows a picture, of whole lines, in one write.
func (s *screen) draw(picture string) error {
	var frame strings.Builder
	frame.WriteString(goHome)
	for i, line := range strings.Split(picture, "\n") {
		if i > 0 {
			frame.WriteString("\r\n")
		}
		frame.WriteString(line + eraseToEnd)
	}
	frame.WriteString(eraseBelow)
	if _, err := io.WriteString(s.out, frame.String()); err != nil {
		return fmt.Errorf("draw: %w", err)
	}
	return nil
}

// show takes the terminal and shows what comes from views, as render draws it for so
// many columns and lines, until ctx or views end or somebody types q. It is drawn anew
// when the terminal changes its size, and comes back after Ctrl-Z.
func show[V any](ctx context.Context, s *screen, views <-chan V, render func(v V, width, height int) string) (err error) {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, unix.SIGWINCH, unix.SIGTSTP)
	defer signal.Stop(signals)
	ctx, quit := context.WithCancelCause(ctx)
	defer quit(nil)
	if err := s.enter(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.leave()) }()
	redraw := make(chan struct{}, 1)
	if s.in != nil {
		stop, err := s.readKeys(func() { quit(errQuit) }, redraw)
		if err != nil {
			return err
		}
		defer stop()
	}
	var last V
	for seen := false; ; {
		select {
		case <-ctx.Done():
			return nil
		case v, ok := <-views:
			if !ok {
				return nil
			}
			last, seen = v, true
		case <-redraw:
		case sig := <-signals:
			if sig == unix.SIGTSTP {
				if err := s.suspend(); err != nil {
					return err
				}
			}
		}
		if !seen {
			continue
		}
		width, height := sizeOf(s.out)
		// In the last column a terminal may wait for what comes before it wraps.
		if err := s.draw(render(last, width-1, height)); err != nil {
			return err
		}
	}
}

// suspend stops the process, with the terminal as it was, until it is continued.
func (s *screen) suspend() error {
	if err := s.leave(); err != nil {
		return err
	}
	continued := make(chan os.Signal, 1)
	signal.Notify(continued, unix.SIGCONT)
	defer signal.Stop(continued)
	if err := unix.Kill(unix.Getpid(), unix.SIGSTOP); err != nil {
		return fmt.Errorf("stop: %w", err)
	}
	<-continued // this thread may run on for a moment
	return s.enter()
}

// readKeys calls quit for q, and asks to redraw for Ctrl-L, until stop is called. A
// keyboard that goes away is a quit.
func (s *screen) readKeys(quit func(), redraw chan<- struct{}) (stop func(), err error) {
	wake, waker, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("read keys: %w", err)
	}
	var reading sync.WaitGroup
	reading.Go(func() {
		const q, ctrlC, ctrlD, ctrlL = 'q', 3, 4, 12
		fds := []unix.PollFd{{Fd: int32(s.in.Fd()), Events: unix.POLLIN}, {Fd: int32(wake.Fd()), Events: unix.POLLIN}}
		var keys [64]byte
		for {
			if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
				quit()
				return
			}
			if fds[1].Revents != 0 {
				return
			}
			if fds[0].Revents == 0 {
				continue
			}
			n, err := unix.Read(int(s.in.Fd()), keys[:])
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil || n == 0 {
				quit()
				return
			}
			for _, key := range keys[:n] {
				switch key {
				case q, 'Q', ctrlC, ctrlD:
					quit()
				case ctrlL:
					select {
					case redraw <- struct{}{}:
					default:
					}
				}
			}
		}
	})
	return func() {
		_ = waker.Close() // which wakes the poll
		reading.Wait()
		_ = wake.Close()
	}, nil
}

// keyboard returns the terminal that a reader reads from, nil if it is none.
func keyboard(r io.Reader) *os.File {
	if f, ok := r.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return f
	}
	return nil
}
