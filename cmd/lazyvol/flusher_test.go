package main

import (
	"errors"
	"os"
	"slices"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// kernel stands in for a kernel that lets this process become an I/O flusher, or
// not, and that executes nothing.
type kernel struct {
	refuses  error
	flusher  uintptr
	executed []string // path and arguments
	env      []string
	as       uintptr // what flusher was then
}

func (k *kernel) prctl(option int, arg uintptr) error {
	if option != unix.PR_SET_IO_FLUSHER {
		return syscall.EINVAL
	}
	if k.refuses == nil {
		k.flusher = arg
	}
	return k.refuses
}

func (k *kernel) exec(path string, args, env []string) error {
	k.executed, k.env, k.as = append([]string{path}, args...), env, k.flusher
	return syscall.ENOENT // a real one does not return else
}

func TestDaemonExecutesItselfAsAnIOFlusher(t *testing.T) {
	var k kernel
	err := becomeFlusher(k.prctl, k.exec)
	self, selfErr := os.Executable()
	if selfErr != nil {
		t.Fatal(selfErr)
	}
	if want := append([]string{self}, os.Args...); !slices.Equal(k.executed, want) {
		t.Errorf("executed %q, want %q", k.executed, want)
	}
	if k.as != 1 {
		t.Errorf("executed with the flag %d", k.as)
	}
	if want := append(os.Environ(), flusherEnv+"=1"); !slices.Equal(k.env, want) {
		t.Errorf("the environment is not ours and %s=1", flusherEnv) // which may hold secrets
	}
	// It could not be executed: this thread must not stay what the others are not.
	if !errors.Is(err, syscall.ENOENT) || k.flusher != 0 {
		t.Errorf("executing failed, and the error is %v, the flag %d", err, k.flusher)
	}
}

func TestIOFlusherIsExecutedOnce(t *testing.T) {
	t.Setenv(flusherEnv, "1")
	var k kernel
	if err := becomeFlusher(k.prctl, k.exec); err != nil || k.executed != nil {
		t.Errorf("executed %q again: %v", k.executed, err)
	}
	if value, there := os.LookupEnv(flusherEnv); there {
		t.Errorf("%s=%s is left for children", flusherEnv, value)
	}
}

func TestDaemonWithoutThePermissionStaysAsItIs(t *testing.T) {
	k := kernel{refuses: syscall.EPERM}
	if err := becomeFlusher(k.prctl, k.exec); !errors.Is(err, syscall.EPERM) || k.executed != nil {
		t.Errorf("executed %q: %v", k.executed, err)
	}
}
