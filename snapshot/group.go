package snapshot

import (
	"context"

	"golang.org/x/sync/errgroup"
)

// newGroup is errgroup.WithContext, except for why the group's context ends when
// one of its functions fails: not with that failure for a cause. A request that is
// cut short fails with its context's cause, and would say of its own object what is
// true of another's: that it does not exist, say.
func newGroup(ctx context.Context) (*errgroup.Group, context.Context) {
	g, failed := errgroup.WithContext(ctx)
	gctx, cancel := context.WithCancelCause(ctx)
	context.AfterFunc(failed, func() { cancel(context.Cause(ctx)) }) // the caller's own cause, if it has ended
	return g, gctx
}
