package main

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sys/unix"
)

// statPatience is how long a mount may take to tell of its root directory, which needs
// no store.
const statPatience = 2 * time.Second

var errNoAnswer = errors.New("it does not answer")

// answer returns what f does, which uses a mount whose daemon may hang: nothing but the
// end of the process ends that then, and f is left behind. errNoAnswer.
func answer[T any](ctx context.Context, patience time.Duration, f func() (T, error)) (T, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, errNoAnswer)
	defer cancel()
	return orLeave(ctx, f)
}

// orLeave returns what f does, or why ctx ended before: f, which cannot be told to end, is
// then left behind.
func orLeave[T any](ctx context.Context, f func() (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	go func() {
		value, err := f()
		done <- result{value, err}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
		var nothing T
		return nothing, context.Cause(ctx)
	}
}

// guardedStat is stat, of what a mount has; errNoAnswer.
func guardedStat(path string) error {
	_, err := answer(context.Background(), statPatience, func() (st unix.Stat_t, err error) {
		return st, unix.Stat(path, &st)
	})
	return err
}

// deadMount reports whether a killed daemon left the mountpoint dead.
func deadMount(dir string) bool { return errors.Is(guardedStat(dir), unix.ENOTCONN) }
