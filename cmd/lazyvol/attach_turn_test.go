package main

import (
	"context"
	"errors"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/lazyvol/lazyvol/internal/vfs"
)

func TestTurnIsOneCommandsAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &app{state: t.TempDir()}
		const target, other = "vol-0123456789abcdef0", "vol-0123456789abcdef1"
		first, err := a.takeTurn(t.Context(), target)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := a.tryTurn(target); !errors.Is(err, vfs.ErrLocked) {
			t.Errorf("taken: %v", err)
		}
		begin := time.Now()
		if _, err := a.takeTurn(t.Context(), target); exitCode(err) != exitRefused || time.Since(begin) < turnPatience {
			t.Errorf("after %v: %v", time.Since(begin), err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := a.takeTurn(ctx, target); !errors.Is(err, context.Canceled) {
			t.Errorf("interrupted: %v", err)
		}
		beside, err := a.takeTurn(t.Context(), other)
		if err != nil {
			t.Fatal(err)
		}
		got := make(chan error)
		go func() {
			second, err := a.takeTurn(t.Context(), target)
			if err == nil {
				err = second.end()
			}
			got <- err
		}()
		synctest.Wait()
		if err := first.end(); err != nil {
			t.Error(err)
		}
		if err := errors.Join(<-got, beside.end()); err != nil {
			t.Error(err)
		}
		if left, err := os.ReadDir(a.attachDir("")); len(left) > 0 || err != nil {
			t.Errorf("left are %v, %v", left, err)
		}
	})
}
