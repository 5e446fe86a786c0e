package blockstore

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"golang.org/x/time/rate"
)

// A RetryPolicy says how often and how fast Retry tries again. Zero fields mean
// the defaults given, which suit one daemon and one bucket.
type RetryPolicy struct {
	// Attempts bounds the tries of one call, the first included; 64.
	Attempts int

	// Total bounds one call: no attempt begins later than this after the call
	// began (a List: after it last made progress); 2 minutes. An attempt under
	// way is not cut short, so a call takes at most Total and the store's own
	// limit on one request.
	Total time.Duration

	// Before the nth retry comes a pause drawn evenly from 0 to Base·2ⁿ⁻¹, at
	// most Max ("full jitter", which spreads the load of many clients best:
	// https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/);
	// 100 ms and 5 s. A server that says how long to wait (Retry-After) is given that
	// first, at most Max: MinIO asks for a minute with every 503
	// (https://github.com/minio/minio/pull/19996), for which no read can wait.
	Base, Max time.Duration

	// Rate and Burst are the budget of all calls on the store together: a token
	// bucket of Burst retries, refilled at Rate a second; 32 and 64. A call that
	// finds it empty does not fail but waits for its token: so a store in
	// trouble sees at most Rate more requests a second than it has callers,
	// and callers still outlast an outage.
	Rate  float64
	Burst int

	// Retried, if not nil, is called before each attempt but the first.
	Retried func()
}

func (p RetryPolicy) withDefaults() RetryPolicy {
	p.Attempts = cmp.Or(p.Attempts, 64)
	p.Total = cmp.Or(p.Total, 2*time.Minute)
	p.Base = cmp.Or(p.Base, 100*time.Millisecond)
	p.Max = cmp.Or(p.Max, 5*time.Second)
	p.Rate = cmp.Or(p.Rate, 32)
	p.Burst = cmp.Or(p.Burst, 64)
	return p
}

// backoff returns the pause before retry n, counted from 1.
func (p RetryPolicy) backoff(n int) time.Duration {
	ceiling := p.Max
	if shift := n - 1; shift < 62 && p.Base<<shift>>shift == p.Base { // else it would overflow
		ceiling = min(ceiling, p.Base<<shift)
	}
	return rand.N(ceiling + 1)
}

// pause returns the pause before retry n, after a failure.
func (p RetryPolicy) pause(n int, failure error) time.Duration {
	var asked *laterError
	if errors.As(failure, &asked) {
		return min(asked.after, p.Max) + p.backoff(n)
	}
	return p.backoff(n)
}

// A laterError is one of a server that says how long to wait before asking again.
type laterError struct {
	error
	after time.Duration // more than 0
}

func (e *laterError) Unwrap() error { return e.error }

// retryStore is a Store that asks again.
type retryStore struct {
	store  Store
	policy RetryPolicy
	budget *rate.Limiter
}

// Retry returns s with calls that fail as ErrUnavailable tried again, and no
// others: every other error is an answer. It is the one place in lazyvol that
// retries requests, and the stores it wraps make one attempt per call.
//
// A conditional Put whose reply was lost is tried again too, and may then meet
// its own object: it reports ErrExists or ErrChanged, as [Store] says.
func Retry(s Store, p RetryPolicy) Store {
	p = p.withDefaults()
	return &retryStore{s, p, rate.NewLimiter(rate.Limit(p.Rate), p.Burst)}
}

// do calls attempt until it succeeds, fails for good, or the policy or ctx ends
// it. An attempt that says it made progress counts as the first one.
func (s *retryStore) do(ctx context.Context, attempt func() (progress bool, err error)) error {
	begin := time.Now()
	for n := 1; ; n++ {
		progress, err := attempt()
		if !errors.Is(err, ErrUnavailable) || ctx.Err() != nil {
			return err
		}
		if progress {
			begin, n = time.Now(), 1
		}
		if n >= s.policy.Attempts {
			return fmt.Errorf("gave up after %d attempts: %w", n, err)
		}
		token := s.budget.Reserve()
		elapsed := time.Since(begin)
		left := s.policy.Total - elapsed
		if left <= 0 || token.Delay() > left {
			token.Cancel()
			return fmt.Errorf("gave up after %d attempts in %v: %w", n, elapsed.Round(time.Millisecond), err)
		}
		// The last attempt is at the very end, however long the pause drawn:
		// who is given a minute to wait is not told of failure after half of it.
		timer := time.NewTimer(max(min(s.policy.pause(n, err), left), token.Delay()))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			token.Cancel()
			return fmt.Errorf("%w after %d attempts: %w", context.Cause(ctx), n, err)
		}
		if s.policy.Retried != nil {
			s.policy.Retried()
		}
	}
}

func (s *retryStore) String() string { return s.store.String() }

func (s *retryStore) Get(ctx context.Context, key string, limit int64) (data []byte, etag string, err error) {
	err = s.do(ctx, func() (bool, error) {
		data, etag, err = s.store.Get(ctx, key, limit)
		return false, err
	})
	return data, etag, err
}

func (s *retryStore) ReadRange(ctx context.Context, key string, off int64, p []byte) error {
	return s.do(ctx, func() (bool, error) {
		return false, s.store.ReadRange(ctx, key, off, p)
	})
}

func (s *retryStore) Put(ctx context.Context, key string, data []byte, c Condition) (etag string, err error) {
	err = s.do(ctx, func() (bool, error) {
		etag, err = s.store.Put(ctx, key, data, c)
		return false, err
	})
	return etag, err
}

func (s *retryStore) Delete(ctx context.Context, keys ...string) error {
	return s.do(ctx, func() (bool, error) {
		return false, s.store.Delete(ctx, keys...)
	})
}

// List goes on behind the last key it gave to fn, so that fn sees each key once
// and a long listing outlasts any number of failures that it outpaces.
func (s *retryStore) List(ctx context.Context, prefix string, fn func(Info) error) error {
	return s.listAfter(ctx, prefix, "", fn)
}

func (s *retryStore) listAfter(ctx context.Context, prefix, last string, fn func(Info) error) error {
	var fnErr error // ends the listing, whatever it wraps
	err := s.do(ctx, func() (bool, error) {
		progress := false
		err := listAfter(ctx, s.store, prefix, last, func(info Info) error {
			if fnErr = fn(info); fnErr != nil {
				return errStopped
			}
			progress, last = true, info.Key
			return nil
		})
		return progress, err
	})
	if fnErr != nil {
		return fnErr
	}
	return err
}

// errStopped ends a listing whose function failed. It is not that function's
// error because that may wrap ErrUnavailable, for a request of its own.
var errStopped = errors.New("listing stopped")

// A resumer is a Store that can begin a listing anywhere, so that one which
// broke off need not begin at its first page again.
type resumer interface {
	// listAfter is List without the keys up to and including after.
	listAfter(ctx context.Context, prefix, after string, fn func(Info) error) error
}

// ListAfter is [Store.List] without the keys up to and including after. It asks s
// to begin there if it can.
func ListAfter(ctx context.Context, s Store, prefix, after string, fn func(Info) error) error {
	return listAfter(ctx, s, prefix, after, fn)
}

// listAfter lists the keys behind after, passing over the others on stores
// that cannot begin there.
func listAfter(ctx context.Context, s Store, prefix, after string, fn func(Info) error) error {
	if r, ok := s.(resumer); ok {
		return r.listAfter(ctx, prefix, after, fn)
	}
	return s.List(ctx, prefix, func(info Info) error {
		if info.Key <= after {
			return nil
		}
		return fn(info)
	})
}
