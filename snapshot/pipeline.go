package snapshot

import (
	"context"
	"iter"

	"golang.org/x/sync/errgroup"
)

// inOrder puts every item through work, by a number of workers at once, and
// then through emit, one at a time and in the order of the items. At most ahead
// items, and one, are begun and not emitted. The first error ends it: the
// context given to work and emit is cancelled, and inOrder returns that error
// when all have returned.
func inOrder[T any](ctx context.Context, workers, ahead int, items iter.Seq2[T, error],
	work, emit func(context.Context, T) error,
) error {
	type ticket struct {
		item T
		done chan struct{} // closed when work is done with the item
	}
	g, ctx := newGroup(ctx)
	queue := make(chan ticket, ahead)   // for the workers
	ordered := make(chan ticket, ahead) // the same, for emit
	pass := func(to chan<- ticket, t ticket) error {
		select {
		case to <- t:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	g.Go(func() error {
		defer close(queue)
		defer close(ordered)
		for item, err := range items {
			if err != nil {
				return err
			}
			// First the place in the order, which is what bounds the items.
			t := ticket{item, make(chan struct{})}
			if err := pass(ordered, t); err != nil {
				return err
			}
			if err := pass(queue, t); err != nil {
				return err
			}
		}
		return nil
	})
	for range workers {
		g.Go(func() error {
			for t := range queue {
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				if err := work(ctx, t.item); err != nil {
					return err
				}
				close(t.done)
			}
			return nil
		})
	}
	g.Go(func() error {
		for t := range ordered {
			select {
			case <-t.done:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			if err := emit(ctx, t.item); err != nil {
				return err
			}
		}
		return nil
	})
	return g.Wait()
}

// places are how many functions may run at once, in all crews that share them.
type places chan struct{}

// A crew runs functions in the background, as many at once as there are places.
// The first error cancels the context that the others run with.
type crew struct {
	group  *errgroup.Group
	ctx    context.Context // of the functions
	places places
}

func newCrew(ctx context.Context, p places) *crew {
	g, ctx := newGroup(ctx)
	return &crew{group: g, ctx: ctx, places: p}
}

// run starts fn as soon as there is a place. It gives up, with an error, when
// ctx ends, which is the crew's own or derived from it.
func (c *crew) run(ctx context.Context, fn func(context.Context) error) error {
	select {
	case c.places <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	c.group.Go(func() error {
		defer func() { <-c.places }()
		return fn(c.ctx)
	})
	return nil
}

// lead runs fn, which may call run, without taking a place, and waits for all.
// It returns the first error.
func (c *crew) lead(fn func(context.Context) error) error {
	c.group.Go(func() error { return fn(c.ctx) })
	return c.group.Wait()
}
