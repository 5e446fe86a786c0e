package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	// startPatience bounds how long a server or a mount takes to be there.
	startPatience = 60 * time.Second
	// endPatience bounds how long one takes to end before it is killed.
	endPatience = 10 * time.Second
	// commandPatience bounds every command.
	commandPatience = 10 * time.Minute
)

// A process is a server that runs beside us.
type process struct {
	cmd  *exec.Cmd
	log  string
	done chan struct{} // closed when it has ended
}

// startProcess starts a server that logs to a file in dir.
func startProcess(dir, name string, env []string, binary string, args ...string) (*process, error) {
	p := &process{cmd: exec.Command(binary, args...), log: filepath.Join(dir, name+".log"), done: make(chan struct{})}
	log, err := os.Create(p.log)
	if err != nil {
		return nil, err
	}
	defer log.Close() // it has its own
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for us to pass on
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		defer close(p.done)
		_ = p.cmd.Wait() // how it ended is told by whoever misses it
	}()
	return p, nil
}

// stop ends the process and what it started.
func (p *process) stop() {
	if p == nil {
		return
	}
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		_ = syscall.Kill(-p.cmd.Process.Pid, sig) // fails if it has ended
		select {
		case <-p.done:
			return
		case <-time.After(endPatience):
		}
	}
}

// await waits until the process does what it was started for.
func (p *process) await(ctx context.Context, what string, there func() bool) error {
	return waitFor(ctx, what, func() (bool, error) {
		select {
		case <-p.done:
			log, err := os.ReadFile(p.log)
			return false, errors.Join(fmt.Errorf("%s ended: %s: %s", filepath.Base(p.cmd.Path), p.cmd.ProcessState, tail(log)), err)
		default:
			return there(), nil
		}
	})
}

// waitFor waits for a condition.
func waitFor(ctx context.Context, what string, there func() (bool, error)) error {
	ctx, cancel := context.WithTimeoutCause(ctx, startPatience, fmt.Errorf("not within %s: %s", startPatience, what))
	defer cancel()
	for {
		if ok, err := there(); ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(time.Millisecond):
		}
	}
}

// tail is the end of what a program said.
func tail(output []byte) string {
	const most = 400
	output = bytes.TrimSpace(output)
	return string(output[max(0, len(output)-most):])
}

// command runs a program to its end and returns what it printed on stdout.
func command(ctx context.Context, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, commandPatience)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	// It may have children, as fio has, that would keep a mount busy.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = endPatience
	if err := cmd.Run(); err != nil {
		if cmd.Process != nil && ctx.Err() != nil {
			_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // fails if all have ended
		}
		return "", fmt.Errorf("%s: %w: %s", filepath.Base(name), err, tail(stderr.Bytes()))
	}
	return strings.TrimSpace(stdout.String()), nil
}

// unmount takes a mount away, by force if it is in use.
func unmount(dir string) {
	for _, flag := range []string{"--", "-l"} {
		ctx, cancel := context.WithTimeout(context.Background(), endPatience)
		_, err := command(ctx, "umount", flag, dir)
		cancel()
		if err == nil {
			return
		}
	}
}

// mountsIn lists what is mounted on and inside a folder.
func mountsIn(dir string) (found []string, err error) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(data)) {
		if fields := strings.Fields(line); len(fields) > 4 && strings.HasPrefix(fields[4]+"/", dir+"/") {
			found = append(found, fields[4])
		}
	}
	return found, nil
}

// tick is the unit of CPU time in /proc: USER_HZ, 100 on all of Linux.
const tick = 10 * time.Millisecond

// cpuOf returns the CPU time that a process has used.
func cpuOf(pid int) (time.Duration, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The name, in parentheses, may hold anything; utime and stime are fields
	// 14 and 15 of the whole.
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	const utime = 14 - 3
	if len(fields) <= utime+1 {
		return 0, fmt.Errorf("/proc/%d/stat: %d fields", pid, len(fields))
	}
	total := time.Duration(0)
	for _, field := range fields[utime : utime+2] {
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return 0, err
		}
		total += time.Duration(n) * tick
	}
	return total, nil
}

// procValue returns a number from a file of "name: number" lines in /proc.
func procValue(pid int, file, name string) (int64, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/%s", pid, file))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if value, ok := strings.CutPrefix(lines.Text(), name+":"); ok {
			return strconv.ParseInt(strings.Fields(value)[0], 10, 64)
		}
	}
	return 0, errors.Join(fmt.Errorf("/proc/%d/%s has no %s", pid, file, name), lines.Err())
}

// A meter measures how many cores were busy with the work that is measured:
// not those that something else on the machine keeps busy.
type meter struct {
	pids  []int // the daemon's first, if there is one
	begin time.Time
	used  []time.Duration
}

// startMeter begins to measure a daemon, if pid is not 0, and with it the server,
// the proxy and ourselves: the tap, and what reads.
func (b *bench) startMeter(pid int) (meter, error) {
	m := meter{pids: append([]int{pid}, b.server.pids...), begin: time.Now()}
	var err error
	m.used, err = m.read()
	return m, err
}

func (m meter) read() (used []time.Duration, err error) {
	for _, pid := range m.pids {
		d := time.Duration(0)
		if pid != 0 {
			if d, err = cpuOf(pid); err != nil {
				return nil, err
			}
		}
		used = append(used, d)
	}
	return used, nil
}

// stop returns how many cores the daemon and all of it kept busy since the
// start.
func (m meter) stop() (own, all float64, err error) {
	wall := time.Since(m.begin).Seconds()
	used, err := m.read()
	if err != nil {
		return 0, 0, err
	}
	for i, d := range used {
		busy := (d - m.used[i]).Seconds() / wall
		if i == 0 {
			own = busy
		}
		all += busy
	}
	return own, all, nil
}
