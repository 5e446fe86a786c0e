// Command lazyvol makes, mounts and deletes snapshots of block devices in
// object storage. It wires the packages together and talks to people; what a
// snapshot or a volume is lives in the packages.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
)

func main() {
	ctx, interrupted := interruptible(context.Background())
	code := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	if interrupted() && code != exitDone {
		code = exitInterrupted
	}
	os.Exit(code)
}

// interruptible returns a context that ends with the first SIGINT or SIGTERM, or SIGHUP
// unless that is ignored (nohup). Commands then take a bounded time to undo what they
// were doing, and a daemon as long as its mount is in use; the second signal ends the
// process at once. Not so a second SIGHUP: of a terminal that is closed, its shell sends
// one, and the kernel another.
func interruptible(parent context.Context) (ctx context.Context, interrupted func() bool) {
	ctx, cancel := context.WithCancelCause(parent)
	signals := make(chan os.Signal, 2)
	ends := []os.Signal{syscall.SIGINT, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) {
		ends = append(ends, syscall.SIGHUP)
	}
	signal.Notify(signals, ends...)
	var seen atomic.Bool
	go func() { // lives as long as the process
		s := <-signals
		seen.Store(true)
		cancel(fmt.Errorf("%w by %s", errInterrupted, s))
		for s := range signals {
			if s != syscall.SIGHUP {
				os.Exit(exitInterrupted)
			}
		}
	}()
	return ctx, seen.Load
}

// errInterrupted is the cause of contexts that a signal ended.
var errInterrupted = errors.New("interrupted")

// run runs one command line and returns its exit code.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	stderr = newConsole(stderr)
	printed := &printer{w: stdout}
	stdout = printed
	app := &app{stdin: stdin, stdout: stdout, stderr: stderr, memory: defaultMemory, keys: newSecretKeys(), meter: newStoreMeter()}
	defer app.events.finish()
	root := app.command()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	command, err := root.ExecuteContextC(ctx)
	if err == nil {
		err = printed.failure()
	}
	if err == nil {
		return exitDone
	}
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		err = context.Cause(ctx)
	}
	if !errors.Is(err, errReported) {
		printError(stderr, err, wantsJSON(command, args, err))
	}
	return exitCode(err)
}
