package main

import (
	"errors"
	"fmt"
	iofs "io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/lazyvol/lazyvol/fs"
)

// probePatience is for how long a mount may take to answer a stat.
const probePatience = 3 * time.Second

// probeCommand is the name of the hidden command that looks at a mount.
const probeCommand = "__probe"

// What it exits with besides 0 and 1.
const (
	probeDenied = 3
	probeDead   = 4
)

var (
	// errMountUnknown: this user may not look.
	errMountUnknown = errors.New("this user may not look into the mount")

	errMountSilent = fmt.Errorf("the mount does not answer within %s", probePatience)
	errMountDead   = errors.New("the mount's daemon has died: 'lazyvol unmount' cleans it up, and mounting again does")
)

// A prober finds out whether mounts answer. Who asks a mount whose daemon hangs may
// not even be killed before it goes on, so processes of their own ask, and a mount
// that has not answered one yet is not asked by another.
type prober struct {
	mu     sync.Mutex // guards asking
	asking map[string]*probing
}

// A probing is a process that looks at a mount.
type probing struct {
	command *exec.Cmd
	done    chan struct{} // closed when it has ended
	err     error         // what it found; to be read after that
}

func newProber() *prober { return &prober{asking: make(map[string]*probing)} }

// probe returns nil if the mount on dir answers within probePatience.
func (p *prober) probe(dir string) error {
	look, err := p.begin(dir)
	if err != nil {
		return fmt.Errorf("look at %s: %w", dir, err)
	}
	timer := time.NewTimer(probePatience)
	defer timer.Stop()
	select {
	case <-look.done:
		return look.err
	case <-timer.C:
		_ = look.command.Process.Kill() // as far as it can be
		return errMountSilent
	}
}

// begin starts a process that looks at dir, unless there is one. It is reaped when it
// ends, which it may not before its mount does.
func (p *prober) begin(dir string) (*probing, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if look := p.asking[dir]; look != nil {
		return look, nil
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	look := &probing{command: exec.Command(self, probeCommand, dir), done: make(chan struct{})}
	look.command.Dir = "/"
	look.command.Env = []string{} // nothing is configured
	if err := look.command.Start(); err != nil {
		return nil, err
	}
	p.asking[dir] = look
	go func() {
		look.err = probed(look.command.Wait())
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.asking, dir)
		close(look.done)
	}()
	return look, nil
}

// probed says what the end of a process found.
func probed(err error) error {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &exit) && exit.ExitCode() == probeDenied:
		return errMountUnknown
	case errors.As(err, &exit) && exit.ExitCode() == probeDead:
		return errMountDead
	case errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL:
		return errMountSilent // for somebody, who began to wait before
	}
	return fmt.Errorf("the mount cannot be looked at: %w", err)
}

// probeMountCommand is what a prober runs.
func (a *app) probeMountCommand() *cobra.Command {
	return &cobra.Command{
		Use: probeCommand + " DIR", Hidden: true, Args: args(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error {
			_, err := os.ReadFile(filepath.Join(args[0], fs.StatusName))
			switch {
			case errors.Is(err, iofs.ErrPermission):
				return codedError{err.Error(), probeDenied}
			case errors.Is(err, unix.ENOTCONN):
				return codedError{err.Error(), probeDead}
			}
			return err
		},
	}
}
