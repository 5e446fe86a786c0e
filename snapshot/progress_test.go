package snapshot_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/lazyvol/lazyvol/snapshot"
)

// The owner of a pending snapshot that shows no sign is given up, by the
// store's clock; one that does is not, however long it takes.
func TestReclaimAbortsAttemptsWhoseOwnerIsLost(t *testing.T) {
	plainAndSealed(t, testReclaimAbortsAttemptsWhoseOwnerIsLost)
}

func testReclaimAbortsAttemptsWhoseOwnerIsLost(t *testing.T, newWorld func(testing.TB) *world) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		d := newDevice(20*testBlock).random(1, span(0, 20)...)
		lost := w.begin(w.plan(nil, d), nil, d)

		// The other one takes four hours to read its third block.
		slow := d.since(nil)
		slow.Read = func(ctx context.Context, block int64, p []byte) error {
			if block == 3 {
				time.Sleep(4 * time.Hour)
			}
			return d.read(ctx, block, p)
		}
		alive, err := w.store.Begin(w.ctx, w.plan(nil, d))
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error)
		go func() { done <- alive.Upload(w.ctx, slow) }()

		time.Sleep(20 * time.Minute)
		if r := w.reclaim(); r.Aborted != 0 || r.Bytes != 0 {
			t.Errorf("after 20 minutes: %+v", r)
		}
		time.Sleep(time.Hour)
		if r := w.reclaim(); r.Aborted != 1 || r.Bytes == 0 {
			t.Errorf("after more than an hour: %+v", r)
		}
		if _, err := lost.Commit(w.ctx); !errors.Is(err, snapshot.ErrAborted) {
			t.Errorf("commit of the lost one: %v", err)
		}
		described, err := w.store.Describe(w.ctx, lost.ID())
		if err != nil || described.State != snapshot.Aborted || !strings.Contains(described.Why, "not been heard of") {
			t.Errorf("the lost one is %+v, %v", described, err)
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if _, err := alive.Commit(w.ctx); err != nil {
			t.Fatal(err)
		}
		w.mustHold(w.open(alive.ID()), d)
		w.wantNone("progress/")
	})
}

// Who waits for others with what was uploaded is alive, whether KeepAlive or the
// upload began first to say so.
func TestAnAttemptIsKeptAliveAfterItsUpload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		d := newDevice(20*testBlock).random(1, span(0, 20)...)
		slow := d.since(nil)
		reading, read := make(chan struct{}), make(chan struct{})
		slow.Read = func(ctx context.Context, block int64, p []byte) error {
			if block == 3 {
				close(reading)
				<-read
			}
			return d.read(ctx, block, p)
		}
		a, err := w.store.Begin(w.ctx, w.plan(nil, d))
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error)
		go func() { done <- a.Upload(w.ctx, slow) }()
		<-reading
		ctx, stop := context.WithCancel(w.ctx)
		var keeping sync.WaitGroup
		keeping.Go(func() { a.KeepAlive(ctx) })
		synctest.Wait()
		close(read)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		if r := w.reclaim(); r.Aborted != 0 {
			t.Errorf("it was taken for lost: %+v", r)
		}
		stop()
		keeping.Wait()
		if _, err := a.Commit(w.ctx); err != nil {
			t.Error(err)
		}
	})
}

// Percent is what others see of a pending snapshot's upload.
func TestProgressOfAPendingSnapshot(t *testing.T) { plainAndSealed(t, testProgressOfAPendingSnapshot) }

func testProgressOfAPendingSnapshot(t *testing.T, newWorld func(testing.TB) *world) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		d := newDevice(200*testBlock).tiny(1, span(0, 200)...)
		src := d.since(nil)
		reached := make(chan struct{})
		src.Read = func(ctx context.Context, block int64, p []byte) error {
			if block == 120 {
				close(reached)
				time.Sleep(time.Minute)
			}
			return d.read(ctx, block, p)
		}
		a, err := w.store.Begin(w.ctx, w.plan(nil, d))
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error)
		go func() { done <- a.Upload(w.ctx, src) }()
		<-reached
		time.Sleep(40 * time.Second)
		described, err := w.reopen().Describe(w.ctx, a.ID())
		if err != nil || described.State != snapshot.Pending || described.Percent != 60 || a.Percent() != 60 {
			t.Errorf("described as %+v, %v; the attempt says %d %%", described, err, a.Percent())
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if a.Percent() != 100 {
			t.Errorf("%d %% after the upload", a.Percent())
		}
		if _, err := a.Commit(w.ctx); err != nil {
			t.Fatal(err)
		}
	})
}
