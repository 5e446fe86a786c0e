package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// flusherEnv tells a process that it was executed again as an I/O flusher.
const flusherEnv = "LAZYVOL_IO_FLUSHER"

// becomeFlusher makes this process an I/O flusher (PR_SET_IO_FLUSHER), by
// executing it again; it returns in the new one, or at once with an error if
// that cannot be. What a loop device has in its page cache goes through the
// daemon: with too much of it dirty the kernel makes writers wait, the daemon
// too, for what only the daemon can clean. A flusher waits for its own files
// alone, and its allocations never for such a write.
//
// Being one is a matter of each thread, which those that it starts inherit, and
// the program that it executes: hence executing again, as the runtime has
// threads already. It needs CAP_SYS_RESOURCE. Nothing may be open that is not to
// be inherited.
func becomeFlusher(prctl func(option int, arg uintptr) error, exec func(path string, args, env []string) error) error {
	if _, again := os.LookupEnv(flusherEnv); again {
		return os.Unsetenv(flusherEnv)
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("become an I/O flusher: %w", err)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := prctl(unix.PR_SET_IO_FLUSHER, 1); err != nil {
		return fmt.Errorf("become an I/O flusher: %w", err)
	}
	err = exec(self, os.Args, append(os.Environ(), flusherEnv+"=1"))
	return errors.Join(fmt.Errorf("become an I/O flusher: execute %s again: %w", self, err), prctl(unix.PR_SET_IO_FLUSHER, 0))
}

// prctl is the system call, with one argument.
func prctl(option int, arg uintptr) error { return unix.Prctl(option, arg, 0, 0, 0) }
