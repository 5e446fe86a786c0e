package snapshot

import (
	"context"
	"errors"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
)

func TestOneFailureIsNotTheCauseOfAnother(t *testing.T) {
	g, gctx := newGroup(t.Context())
	g.Go(func() error { return blockstore.ErrNotExist })
	g.Go(func() error {
		<-gctx.Done()
		if cause := context.Cause(gctx); !errors.Is(cause, context.Canceled) || errors.Is(cause, blockstore.ErrNotExist) {
			t.Errorf("the context ended because of %v", cause)
		}
		return nil
	})
	if err := g.Wait(); !errors.Is(err, blockstore.ErrNotExist) {
		t.Errorf("Wait: %v", err)
	}
}

func TestGroupEndsForTheReasonOfItsCaller(t *testing.T) {
	interrupted := errors.New("interrupted")
	for range 200 { // the two ways by which the end arrives race
		ctx, cancel := context.WithCancelCause(t.Context())
		g, gctx := newGroup(ctx)
		g.Go(func() error {
			<-gctx.Done()
			return context.Cause(gctx)
		})
		cancel(interrupted)
		if err := g.Wait(); !errors.Is(err, interrupted) {
			t.Fatalf("Wait: %v", err)
		}
	}
}
