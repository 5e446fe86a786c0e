package blockstore_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/manifest"
)

func TestRetryOutlastsFailuresOfEveryCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for n := range 5 { // failures before each success
			faulty := blockstoretest.NewFaulty(blockstore.NewMem())
			s := blockstore.Retry(faulty, blockstore.RetryPolicy{})
			mustPut(t, s, "k", "data")
			for _, op := range []blockstoretest.Op{blockstoretest.OpGet, blockstoretest.OpReadRange, blockstoretest.OpPut, blockstoretest.OpDelete, blockstoretest.OpList} {
				faulty.Inject(blockstoretest.Rule{Op: op, Times: n}, blockstoretest.Fault{Err: fmt.Errorf("a storm: %w", blockstore.ErrUnavailable)})
			}
			if n == 0 {
				faulty.Heal()
			}
			for call, err := range callAll(t.Context(), s) {
				if err != nil {
					t.Errorf("%s with %d failures: %v", call, n, err)
				}
			}
		}
	})
}

func TestRetryTakesAnAnswerForAnAnswer(t *testing.T) {
	for _, answer := range []error{
		blockstore.ErrNotExist, blockstore.ErrExists, blockstore.ErrChanged, blockstore.ErrShort, blockstore.ErrTooLarge,
		blockstore.ErrDenied, blockstore.ErrNoStore, manifest.ErrCorrupt, blockstore.ErrKey, errors.New("anything else"),
	} {
		faulty := blockstoretest.NewFaulty(blockstore.NewMem())
		faulty.Inject(blockstoretest.Rule{}, blockstoretest.Fault{Err: answer})
		errs := callAll(t.Context(), blockstore.Retry(faulty, blockstore.RetryPolicy{}))
		for call, err := range errs {
			if !errors.Is(err, answer) {
				t.Errorf("%s: got error %v, want %v", call, err, answer)
			}
		}
		if got := len(faulty.Calls()); got != len(errs) {
			t.Errorf("%v: %d calls became %d", answer, len(errs), got)
		}
	}
}

func TestRetryDoesNotHideThatItsOwnPutWasApplied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		faulty := blockstoretest.NewFaulty(blockstore.NewMem())
		s := blockstore.Retry(faulty, blockstore.RetryPolicy{})
		lose := func() {
			faulty.Inject(blockstoretest.Rule{Op: blockstoretest.OpPut, Times: 1}, blockstoretest.Fault{LoseReply: true})
		}
		lose()
		if _, err := s.Put(t.Context(), "k", []byte("mine"), blockstore.IfAbsent); !errors.Is(err, blockstore.ErrExists) {
			t.Errorf("create: got error %v, want %v", err, blockstore.ErrExists)
		}
		data, etag, err := s.Get(t.Context(), "k", 100)
		if err != nil || string(data) != "mine" {
			t.Errorf("got %q, %v", data, err)
		}
		faulty.Heal()
		lose()
		if _, err := s.Put(t.Context(), "k", []byte("mine too"), blockstore.IfMatch(etag)); !errors.Is(err, blockstore.ErrChanged) {
			t.Errorf("replace: got error %v, want %v", err, blockstore.ErrChanged)
		}
	})
}

// down returns a store that is never available, behind Retry.
func down(p blockstore.RetryPolicy) (*blockstoretest.Faulty, blockstore.Store) {
	faulty := blockstoretest.NewFaulty(blockstore.NewMem())
	faulty.Inject(blockstoretest.Rule{}, blockstoretest.Fault{Err: blockstore.ErrUnavailable})
	return faulty, blockstore.Retry(faulty, p)
}

func TestRetryGivesUpAfterItsAttempts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		faulty, s := down(blockstore.RetryPolicy{Attempts: 4})
		if err := s.Delete(t.Context(), "k"); !errors.Is(err, blockstore.ErrUnavailable) {
			t.Errorf("got error %v, want %v", err, blockstore.ErrUnavailable)
		}
		if got := len(faulty.Calls()); got != 4 {
			t.Errorf("made %d attempts, want 4", got)
		}
	})
}

func TestRetryGivesUpAfterItsTotalTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const total, attempt = 20 * time.Second, 3 * time.Second
		faulty, s := down(blockstore.RetryPolicy{Attempts: 1 << 30, Total: total})
		faulty.Heal()
		faulty.Inject(blockstoretest.Rule{}, blockstoretest.Fault{Delay: attempt, Err: blockstore.ErrUnavailable})
		begin := time.Now()
		if err := s.Delete(t.Context(), "k"); !errors.Is(err, blockstore.ErrUnavailable) {
			t.Errorf("got error %v, want %v", err, blockstore.ErrUnavailable)
		}
		if took := time.Since(begin); took > total+attempt || took < total/2 {
			t.Errorf("gave up after %v, want about %v and no more than one attempt longer", took, total)
		}
	})
}

func TestRetryByDefaultOutlastsAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		faulty, s := down(blockstore.RetryPolicy{})
		go func() {
			time.Sleep(time.Minute)
			faulty.Heal()
		}()
		if err := s.Delete(t.Context(), "k"); err != nil {
			t.Errorf("an outage of a minute ended a call: %v", err)
		}
	})
}

func TestRetryStopsWithItsContextAndSaysWhy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, s := down(blockstore.RetryPolicy{Base: time.Hour, Max: time.Hour, Total: 100 * time.Hour})
		cause := errors.New("the read deadline")
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, cause)
		defer cancel()
		begin := time.Now()
		err := s.Delete(ctx, "k")
		if !errors.Is(err, cause) || !errors.Is(err, blockstore.ErrUnavailable) {
			t.Errorf("got error %v, want the context's cause and the last attempt's", err)
		}
		if took := time.Since(begin); took > time.Second {
			t.Errorf("went on for %v after its context was done", took-time.Second)
		}
	})
}

func TestRetryPausesGrowAndSpread(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const calls = 200
		p := blockstore.RetryPolicy{Attempts: 8, Base: 100 * time.Millisecond, Max: 2 * time.Second, Total: time.Hour, Rate: 1e6, Burst: 1e6}
		faulty := blockstoretest.NewFaulty(blockstore.NewMem())
		var last time.Time
		pauses := make([]time.Duration, p.Attempts) // before attempt n, over all calls
		attempt := 0
		faulty.Inject(blockstoretest.Rule{}, blockstoretest.Fault{
			Before: func(context.Context, blockstoretest.Call) {
				pause := time.Since(last)
				if limit := min(p.Max, p.Base<<max(attempt-1, 0)); attempt > 0 && pause > limit {
					t.Errorf("paused %v before retry %d, want at most %v", pause, attempt, limit)
				}
				pauses[attempt] += pause
				attempt, last = attempt+1, time.Now()
			},
			Err: blockstore.ErrUnavailable,
		})
		s := blockstore.Retry(faulty, p)
		for range calls {
			attempt, last = 0, time.Now()
			if err := s.Delete(t.Context(), "k"); !errors.Is(err, blockstore.ErrUnavailable) {
				t.Fatal(err)
			}
		}
		for n := 1; n < p.Attempts; n++ {
			mean, want := pauses[n]/calls, min(p.Max, p.Base<<(n-1))/2
			if mean < want*3/4 || mean > want*5/4 {
				t.Errorf("the pauses before retry %d are %v on average, want about %v", n, mean, want)
			}
		}
	})
}

// A server that asks to be left alone for a while is, but for no longer than a
// call can wait.
func TestRetryWaitsForAsLongAsTheServerAsks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const longest, total = 5 * time.Second, 20 * time.Second
		for asked, want := range map[time.Duration]time.Duration{0: 0, time.Second: time.Second, time.Hour: longest} {
			faulty := blockstoretest.NewFaulty(blockstore.NewMem())
			var attempts []time.Time
			fault := blockstoretest.Fault{
				Err:    fmt.Errorf("throttled: %w", blockstore.Later(blockstore.ErrUnavailable, asked)),
				Before: func(context.Context, blockstoretest.Call) { attempts = append(attempts, time.Now()) },
			}
			if asked == 0 {
				fault.Err = blockstore.ErrUnavailable
			}
			faulty.Inject(blockstoretest.Rule{}, fault)
			s := blockstore.Retry(faulty, blockstore.RetryPolicy{Base: time.Millisecond, Max: longest, Total: total})
			begin := time.Now()
			if err := s.Delete(t.Context(), "k"); !errors.Is(err, blockstore.ErrUnavailable) {
				t.Errorf("asked for %v: %v", asked, err)
			}
			if pause := attempts[1].Sub(attempts[0]); pause < want || pause > want+time.Millisecond {
				t.Errorf("asked for %v, and waited for %v", asked, pause)
			}
			if took := time.Since(begin); took > total {
				t.Errorf("asked for %v, and went on for %v", asked, took)
			}
		}
	})
}

func TestRetriesOfAllCallsShareABudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const callers, rate, burst, outage = 50, 10, 20, 30 * time.Second
		faulty, s := down(blockstore.RetryPolicy{Base: time.Millisecond, Max: time.Millisecond, Attempts: 1 << 30, Rate: rate, Burst: burst})
		var wg sync.WaitGroup
		for range callers {
			wg.Go(func() {
				if err := s.Delete(t.Context(), "k"); err != nil {
					t.Errorf("a call did not outlast the outage: %v", err)
				}
			})
		}
		time.Sleep(outage)
		during := len(faulty.Calls())
		faulty.Heal()
		wg.Wait()
		if most := callers + burst + rate*int(outage/time.Second) + 1; during > most || during < most/2 {
			t.Errorf("the store saw %d requests in an outage, want at most %d", during, most)
		}
	})
}

func TestRetriedListingGivesEachKeyOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := blockstore.NewMem()
		var want []string
		for i := range 100 {
			want = append(want, fmt.Sprintf("list/%03d", i))
			mustPut(t, mem, want[i], "")
		}
		// Every listing breaks off after three keys: more often than Attempts allows.
		s := blockstore.Retry(&brittleLister{Store: mem, keys: 3}, blockstore.RetryPolicy{Attempts: 5})
		if diff := cmp.Diff(want, listKeys(t, s)); diff != "" {
			t.Errorf("listing (-want +got):\n%s", diff)
		}
	})
}

func TestRetriedListingThatGetsNowhereGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := blockstore.NewMem()
		mustPut(t, mem, "k", "")
		lister := &brittleLister{Store: mem}
		err := blockstore.Retry(lister, blockstore.RetryPolicy{Attempts: 5}).List(t.Context(), "", func(blockstore.Info) error { return nil })
		if !errors.Is(err, blockstore.ErrUnavailable) || lister.calls != 5 {
			t.Errorf("gave up after %d attempts with %v, want 5 and %v", lister.calls, err, blockstore.ErrUnavailable)
		}
	})
}

func TestRetryLeavesTheErrorOfAListFunctionAlone(t *testing.T) {
	mem := blockstore.NewMem()
	mustPut(t, mem, "k", "")
	calls := 0
	failed := fmt.Errorf("a request of its own: %w", blockstore.ErrUnavailable)
	err := blockstore.Retry(mem, blockstore.RetryPolicy{}).List(t.Context(), "", func(blockstore.Info) error {
		calls++
		return failed
	})
	if err != failed || calls != 1 {
		t.Errorf("got %v after %d calls, want the function's own error after 1", err, calls)
	}
}

// brittleLister is a store, unable to begin a listing in the middle, whose
// listings fail after so many keys that the last one did not give.
type brittleLister struct {
	blockstore.Store
	keys  int
	given string // last key given
	calls int
}

func (s *brittleLister) List(ctx context.Context, prefix string, fn func(blockstore.Info) error) error {
	s.calls++
	left := s.keys
	return s.Store.List(ctx, prefix, func(info blockstore.Info) error {
		if info.Key > s.given {
			if left == 0 {
				return fmt.Errorf("broke off: %w", blockstore.ErrUnavailable)
			}
			left--
			s.given = info.Key
		}
		return fn(info)
	})
}
