package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"syscall"
)

// readyEnv tells a background process on which file descriptor to report that
// it is ready, or why it never will be.
const readyEnv = "LAZYVOL_READY_FD"

// settledFlag tells a background process that what the environment and a
// configuration file say of its flags is on its command line: they are asked once.
const settledFlag = "settled"

// report is what a background process tells the command that started it, as
// one line of JSON.
type report struct {
	Result string `json:"result,omitempty"` // what the command prints on stdout
	Error  string `json:"error,omitempty"`
	Code   int    `json:"code,omitempty"` // its exit code

	EBSCode string `json:"ebsCode,omitempty"` // "": EBS has none
}

// spawn runs this program again in the background, in a session of its own,
// and returns what it reports. Its stderr is ours until then. If ctx ends first
// it is told to end, and waited for.
func (a *app) spawn(ctx context.Context, args []string) (result string, err error) {
	r, w, err := os.Pipe()
	if err != nil {
		return "", fmt.Errorf("start in the background: %w", err)
	}
	defer r.Close()
	self, err := os.Executable()
	if err != nil {
		return "", errors.Join(fmt.Errorf("start in the background: %w", err), w.Close())
	}
	if err := inheritNothing(); err != nil {
		return "", errors.Join(fmt.Errorf("start in the background: %w", err), w.Close())
	}
	c := exec.Command(self, append([]string{"--" + settledFlag}, args...)...)
	c.Dir = "/"
	c.Stderr = a.stderr
	if f := fileOf(a.stderr); f != nil {
		c.Stderr = f // which it keeps when we have ended
	}
	c.Env = append(a.backgroundEnv(), readyEnv+"=3")
	c.ExtraFiles = []*os.File{w}
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := c.Start(); err != nil {
		return "", errors.Join(fmt.Errorf("start in the background: %w", err), w.Close())
	}
	if err := w.Close(); err != nil {
		return "", err
	}
	reports := make(chan report, 1)
	go func() {
		var rep report
		line, err := bufio.NewReader(r).ReadBytes('\n')
		if err == nil {
			err = json.Unmarshal(line, &rep)
		}
		if err != nil {
			rep = report{Error: "the background process ended before it was ready", Code: exitFailed}
			if state, err := c.Process.Wait(); err == nil {
				rep.Error = fmt.Sprintf("%s (%s)", rep.Error, state)
			}
		}
		reports <- rep
	}()
	var rep report
	select {
	case rep = <-reports:
	case <-ctx.Done():
		if err := c.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return "", err
		}
		if rep = <-reports; rep.Error == "" { // it was ready at that moment, and ends again
			_, err := c.Process.Wait()
			return "", errors.Join(context.Cause(ctx), err)
		}
	}
	if rep.Error != "" {
		return "", remoteError{rep}
	}
	return rep.Result, c.Process.Release()
}

// inheritNothing keeps the files that this process was started with, but the standard
// ones, from those that it starts: a daemon would hold the lock of the script that ran
// us (flock 9), and keep open its pipes, for as long as it lives.
func inheritNothing() error {
	const standard = 2
	files, err := os.ReadDir("/proc/self/fd")
	for _, f := range files {
		if fd, err := strconv.Atoi(f.Name()); err == nil && fd > standard {
			syscall.CloseOnExec(fd)
		}
	}
	return err
}

// backgroundEnv is the environment of a background process. What may hold a secret is
// here and not on its command line, which each user of the host can read.
func (a *app) backgroundEnv() []string { return append(os.Environ(), onEventEnv+"="+a.onEvent) }

// readiness is a background process's way to its starter.
type readiness struct {
	pipe io.WriteCloser // nil when it runs in the foreground, or has reported
}

// newReadiness takes the descriptor that spawn passed, if any.
func newReadiness() (*readiness, error) {
	value, ok := os.LookupEnv(readyEnv)
	if !ok {
		return &readiness{}, nil
	}
	if err := os.Unsetenv(readyEnv); err != nil {
		return nil, err
	}
	fd, err := strconv.Atoi(value)
	if err != nil {
		return nil, fmt.Errorf("%s=%q is not a file descriptor", readyEnv, value)
	}
	syscall.CloseOnExec(fd)
	return &readiness{pipe: os.NewFile(uintptr(fd), "ready")}, nil
}

// background reports whether somebody waits for the report.
func (r *readiness) background() bool { return r.pipe != nil }

// ready reports success.
func (r *readiness) ready(result string) error { return r.send(report{Result: result}) }

// failed reports failure, unless ready was reported before. It returns err, or
// nil if it went to the starter, which shows it.
func (r *readiness) failed(err error) error {
	if err == nil || r.pipe == nil {
		return err
	}
	if sendErr := r.send(failure(err)); sendErr != nil {
		return errors.Join(err, sendErr)
	}
	return errReported
}

// errReported is the failure of a background process that its starter shows.
var errReported = errors.New("failed as reported")

func (r *readiness) send(rep report) error {
	if r.pipe == nil {
		return nil
	}
	pipe := r.pipe
	r.pipe = nil
	line, err := json.Marshal(rep)
	if err == nil {
		_, err = pipe.Write(append(line, '\n'))
	}
	return errors.Join(err, pipe.Close())
}
