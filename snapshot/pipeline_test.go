package snapshot

import (
	"context"
	"errors"
	"iter"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// count yields 0 to n-1, and then an error if there is one.
func count(n int, err error) iter.Seq2[int, error] {
	return func(yield func(int, error) bool) {
		for i := range n {
			if !yield(i, nil) {
				return
			}
		}
		if err != nil {
			yield(0, err)
		}
	}
}

func TestInOrderEmitsInOrderAndWithinBounds(t *testing.T) {
	for _, bounds := range [][2]int{{1, 1}, {1, 5}, {4, 1}, {4, 16}, {16, 4}} {
		workers, ahead := bounds[0], bounds[1]
		synctest.Test(t, func(t *testing.T) {
			const items = 200
			var begun, working, most, emitted atomic.Int64
			var got []int
			err := inOrder(t.Context(), workers, ahead, count(items, nil),
				func(ctx context.Context, i int) error {
					if n := begun.Add(1) - emitted.Load(); n > int64(ahead)+1 {
						t.Errorf("%d items begun and not emitted", n)
					}
					if n := working.Add(1); n > most.Load() {
						most.Store(n)
					}
					defer working.Add(-1)
					time.Sleep(rand.N(time.Second))
					return nil
				},
				func(ctx context.Context, i int) error {
					got = append(got, i)
					emitted.Add(1)
					return nil
				})
			if err != nil {
				t.Error(err)
			}
			if !slices.IsSorted(got) || len(got) != items {
				t.Errorf("emitted %v", got)
			}
			if n := most.Load(); n > int64(workers) {
				t.Errorf("%d at work at once", n)
			}
		})
	}
}

// An error of any stage ends the others, also those that wait, and is what
// comes out.
func TestInOrderEndsAtTheFirstError(t *testing.T) {
	boom := errors.New("boom")
	hang := func(ctx context.Context, _ int) error {
		<-ctx.Done()
		return context.Cause(ctx)
	}
	at := func(n int, before func(context.Context, int) error) func(context.Context, int) error {
		return func(ctx context.Context, i int) error {
			if i == n {
				return boom
			}
			return before(ctx, i)
		}
	}
	pass := func(context.Context, int) error { return nil }
	for name, c := range map[string]struct {
		items      iter.Seq2[int, error]
		work, emit func(context.Context, int) error
	}{
		"items, work hangs": {count(3, boom), hang, pass},
		"items, emit hangs": {count(3, boom), pass, hang},
		"work, others hang": {count(100, nil), at(3, hang), pass},
		"work, emit hangs":  {count(100, nil), at(3, pass), hang},
		"emit, work hangs": {count(100, nil), func(ctx context.Context, i int) error {
			return map[bool]func(context.Context, int) error{true: pass, false: hang}[i == 0](ctx, i)
		}, at(0, pass)},
		"emit, queues full":  {count(100, nil), pass, at(50, pass)},
		"work at the end":    {count(100, nil), at(99, pass), pass},
		"items at the start": {count(0, boom), pass, pass},
	} {
		t.Run(name, func(t *testing.T) {
			if err := inOrder(t.Context(), 4, 8, c.items, c.work, c.emit); err != boom {
				t.Errorf("it ended with %v", err)
			}
		})
	}
	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		emit := func(ctx context.Context, i int) error {
			cancel(boom)
			return hang(ctx, i)
		}
		if err := inOrder(ctx, 4, 8, count(100, nil), pass, emit); err != boom {
			t.Errorf("it ended with %v", err)
		}
	})
}

func TestCrewHasPlacesForSoMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var working, most atomic.Int64
		shared := make(places, 3)
		lead := func() error {
			c := newCrew(t.Context(), shared)
			return c.lead(func(ctx context.Context) error {
				for range 20 {
					err := c.run(ctx, func(context.Context) error {
						if n := working.Add(1); n > most.Load() {
							most.Store(n)
						}
						defer working.Add(-1)
						time.Sleep(time.Second)
						return nil
					})
					if err != nil {
						return err
					}
				}
				return nil
			})
		}
		done := make(chan error)
		go func() { done <- lead() }()
		if err := errors.Join(lead(), <-done); err != nil {
			t.Error(err)
		}
		if n := most.Load(); n != 3 {
			t.Errorf("%d at once", n)
		}
	})
}

// A crew whose places are all taken by functions that hang still ends when one
// fails.
func TestCrewEndsAtTheFirstError(t *testing.T) {
	boom := errors.New("boom")
	c := newCrew(t.Context(), make(places, 2))
	err := c.lead(func(ctx context.Context) error {
		for i := 0; ; i++ {
			err := c.run(ctx, func(ctx context.Context) error {
				if i == 1 {
					return boom
				}
				<-ctx.Done()
				return context.Cause(ctx)
			})
			if err != nil {
				return err
			}
		}
	})
	if err != boom {
		t.Errorf("it ended with %v", err)
	}
}

func TestSlotSetIsASet(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		set := make(slotSet)
		model := make(map[packID]map[uint16]bool)
		for range rapid.IntRange(0, 60).Draw(t, "steps") {
			id := packID{1, rapid.Uint32Range(0, 2).Draw(t, "pack")}
			slot := rapid.SampledFrom([]uint16{0, 1, 63, 64, 65, 127, 128, 1023}).Draw(t, "slot")
			if model[id] == nil {
				model[id] = make(map[uint16]bool)
			}
			had := model[id][slot]
			if set[id].has(slot) != had {
				t.Fatalf("has %d: %v", slot, !had)
			}
			if rapid.Bool().Draw(t, "add") {
				if set.add(id, slot) == had {
					t.Fatalf("add %d: %v", slot, had)
				}
				model[id][slot] = true
			} else {
				if set.remove(id, slot) != had {
					t.Fatalf("remove %d: %v", slot, !had)
				}
				delete(model[id], slot)
			}
		}
		for id, slots := range model {
			got := slices.Collect(set[id].all)
			want := make([]uint16, 0, len(slots))
			for slot := range slots {
				want = append(want, slot)
			}
			slices.Sort(want)
			last := -1
			if len(want) > 0 {
				last = int(want[len(want)-1])
			}
			if !slices.Equal(got, want) || set[id].len() != len(want) || set[id].last() != last {
				t.Fatalf("%v, of %d up to %d, instead of %v", got, set[id].len(), set[id].last(), want)
			}
			if _, there := set[id]; there != (len(want) > 0) {
				t.Fatalf("a pack with %d slots is there: %v", len(want), there)
			}
		}
	})
}
