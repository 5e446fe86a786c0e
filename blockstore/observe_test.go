package blockstore_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
)

func TestObservedStoreKeepsThePromises(t *testing.T) {
	blockstoretest.Run(t, func(*testing.T) blockstore.Store {
		return blockstore.Observe(blockstore.NewMem(), func(blockstore.Request) {})
	})
}

// observed returns a store over s, and what it was seen doing.
func observed(s blockstore.Store) (blockstore.Store, *[]blockstore.Request) {
	var seen []blockstore.Request
	return blockstore.Observe(s, func(r blockstore.Request) { seen = append(seen, r) }), &seen
}

func TestRequestsAreSeenWithTimeBytesAndResult(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		faulty := blockstoretest.NewFaulty(blockstore.NewMem())
		s, seen := observed(faulty)
		mustPut(t, s, "a/1", "12345")
		faulty.Inject(blockstoretest.Rule{Times: 1}, blockstoretest.Fault{Delay: time.Second})
		if _, _, err := s.Get(t.Context(), "a/1", 100); err != nil {
			t.Fatal(err)
		}
		if err := s.ReadRange(t.Context(), "a/1", 1, make([]byte, 3)); err != nil {
			t.Fatal(err)
		}
		if err := s.ReadRange(t.Context(), "a/1", 1, make([]byte, 30)); !errors.Is(err, blockstore.ErrShort) {
			t.Fatal(err)
		}
		if _, err := s.Put(t.Context(), "a/1", []byte("12"), blockstore.IfAbsent); !errors.Is(err, blockstore.ErrExists) {
			t.Fatal(err)
		}
		err := s.List(t.Context(), "a/", func(blockstore.Info) error { time.Sleep(time.Minute); return nil })
		if err != nil {
			t.Fatal(err)
		}
		mine := errors.New("mine")
		if err := s.List(t.Context(), "", func(blockstore.Info) error { return mine }); err != mine {
			t.Fatal(err)
		}
		if err := s.Delete(t.Context(), "a/1"); err != nil {
			t.Fatal(err)
		}
		want := []blockstore.Request{
			{Operation: blockstore.OpPut, Result: blockstore.ResultOK, Sent: 5},
			{Operation: blockstore.OpGet, Result: blockstore.ResultOK, Took: time.Second, Received: 5},
			{Operation: blockstore.OpRead, Result: blockstore.ResultOK, Received: 3},
			{Operation: blockstore.OpRead, Result: blockstore.ResultOK}, // it answered
			{Operation: blockstore.OpPut, Result: blockstore.ResultOK, Sent: 2},
			{Operation: blockstore.OpList, Result: blockstore.ResultOK}, // without its function's minute
			{Operation: blockstore.OpList, Result: blockstore.ResultOK}, // whose failure is not the store's
			{Operation: blockstore.OpDelete, Result: blockstore.ResultOK},
		}
		if diff := cmp.Diff(want, *seen); diff != "" {
			t.Error(diff)
		}
	})
}

func TestFailedRequestsAreToldApart(t *testing.T) {
	for err, want := range map[error]blockstore.Result{
		blockstore.ErrUnavailable: blockstore.ResultUnavailable,
		blockstore.ErrDenied:      blockstore.ResultDenied,
		blockstore.ErrNotExist:    blockstore.ResultOK,
		blockstore.ErrChanged:     blockstore.ResultOK,
		blockstore.ErrTooLarge:    blockstore.ResultOK,
		blockstore.ErrNoStore:     blockstore.ResultError,
		errors.New("anything"):    blockstore.ResultError,
	} {
		faulty := blockstoretest.NewFaulty(blockstore.NewMem())
		s, seen := observed(faulty)
		faulty.Inject(blockstoretest.Rule{}, blockstoretest.Fault{Err: fmt.Errorf("fault: %w", err)})
		for call, err := range callAll(t.Context(), s) {
			if err == nil {
				t.Errorf("%s passed", call)
			}
		}
		if len(*seen) != 6 {
			t.Errorf("%v: %d of 6 calls were seen", err, len(*seen))
		}
		for _, r := range *seen {
			if r.Result != want || r.Received != 0 {
				t.Errorf("%v: %+v, want %s", err, r, want)
			}
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s, seen := observed(blockstore.NewMem())
	if _, _, err := s.Get(ctx, "k", 1); err == nil || len(*seen) != 1 || (*seen)[0].Result != blockstore.ResultCanceled {
		t.Errorf("of a caller who went: %v, %+v", err, *seen)
	}
}

func TestThrottlingIsToldFromOutages(t *testing.T) {
	for _, c := range []struct {
		status int
		code   string
		want   blockstore.Result
	}{
		{http.StatusServiceUnavailable, "SlowDown", blockstore.ResultThrottled},
		{http.StatusTooManyRequests, "TooManyRequests", blockstore.ResultThrottled},
		{http.StatusServiceUnavailable, "ServiceUnavailable", blockstore.ResultUnavailable},
		{http.StatusInternalServerError, "InternalError", blockstore.ResultUnavailable},
		{http.StatusForbidden, "InvalidAccessKeyId", blockstore.ResultDenied},
	} {
		s, seen := observed(fakeS3(t, func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(c.status)
			fmt.Fprintf(w, `<?xml version="1.0" encoding="UTF-8"?><Error><Code>%s</Code></Error>`, c.code)
		}))
		if _, err := s.Put(t.Context(), "k", []byte("data"), blockstore.IfAbsent); err == nil {
			t.Errorf("%s passed", c.code)
		}
		if len(*seen) != 1 || (*seen)[0].Result != c.want {
			t.Errorf("%d %s: seen %+v, want one %s", c.status, c.code, *seen, c.want)
		}
	}
}

// Under Retry each attempt is seen, and each but the first is told to be a retry.
func TestEachAttemptIsSeen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		faulty := blockstoretest.NewFaulty(blockstore.NewMem())
		faulty.Inject(blockstoretest.Rule{Times: 3}, blockstoretest.Fault{Err: blockstore.ErrUnavailable})
		counted, seen := observed(faulty)
		retries := 0
		s := blockstore.Retry(counted, blockstore.RetryPolicy{Retried: func() { retries++ }})
		mustPut(t, s, "k", "data")
		if len(*seen) != 4 || retries != 3 || (*seen)[2].Result != blockstore.ResultUnavailable || (*seen)[3].Result != blockstore.ResultOK {
			t.Errorf("%d retries, and seen %+v", retries, *seen)
		}
	})
}
