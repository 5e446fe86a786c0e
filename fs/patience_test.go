package fs

import (
	"context"
	"errors"
	"os"
	"runtime"
	"testing"
	"testing/synctest"
	"time"
)

func newPatience(limit time.Duration) *patience {
	p := &patience{interrupted: make(chan struct{}), connected: func() bool { return true }, tid: uint32(os.Getpid())}
	if limit > 0 {
		p.deadline = time.Now().Add(limit)
	}
	return p
}

func TestPatienceCostsNothingUntilSomebodyWaits(t *testing.T) {
	before := runtime.NumGoroutine()
	p := newPatience(time.Hour)
	if err := p.Err(); err != nil {
		t.Errorf("at the start: %v", err)
	}
	if _, ok := p.Deadline(); !ok {
		t.Error("no deadline")
	}
	if n := runtime.NumGoroutine(); n != before {
		t.Errorf("%d goroutines more", n-before)
	}
	p.end()
	if err := p.Err(); !errors.Is(err, context.Canceled) {
		t.Errorf("at the end: %v", err)
	}
}

func TestPatienceEnds(t *testing.T) {
	interrupted := make(chan struct{})
	close(interrupted)
	for _, c := range []struct {
		name  string
		until func(p *patience)
		want  error
	}{
		{"when the time is up", func(p *patience) { <-p.Done() }, context.DeadlineExceeded},
		{"when the time is up and nobody waits", func(*patience) { time.Sleep(2 * time.Minute) }, context.DeadlineExceeded},
		{"when the request is answered", func(p *patience) { done := p.Done(); p.end(); <-done }, context.Canceled},
		{"when the request is answered, for those who ask then", func(p *patience) { p.end(); <-p.Done() }, context.Canceled},
		{"when the connection is gone", func(p *patience) {
			p.interrupted = interrupted
			p.connected = func() bool { return false }
			<-p.Done()
		}, context.Canceled},
		{"when the interrupted caller is gone", func(p *patience) {
			p.interrupted = interrupted
			p.tid = 1<<31 - 1
			<-p.Done()
		}, context.Canceled},
		{"when the interrupted caller cannot be looked at", func(p *patience) {
			p.interrupted = interrupted
			p.tid = 0
			<-p.Done()
		}, context.Canceled},
		{"when the interrupted caller lives on, in time", func(p *patience) {
			p.interrupted = interrupted
			<-p.Done()
		}, context.DeadlineExceeded},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newPatience(time.Minute)
				if c.until(p); !errors.Is(p.Err(), c.want) {
					t.Errorf("%v, want %v", p.Err(), c.want)
				}
				p.end()
			})
		})
	}
}

func TestContextsOfARequestEndWithIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPatience(time.Minute)
		ctx, cancel := context.WithTimeout(p, time.Hour)
		defer cancel()
		<-ctx.Done()
		if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
			t.Errorf("%v", ctx.Err())
		}
		p.end()
	})
}
