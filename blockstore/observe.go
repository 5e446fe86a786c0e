package blockstore

import (
	"context"
	"errors"
	"net/http"
	"time"

	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/smithy-go"
)

// An Operation is a method of a Store, as monitoring names it.
type Operation string

// The operations.
const (
	OpGet    Operation = "get"
	OpRead   Operation = "read" // of a range
	OpPut    Operation = "put"
	OpDelete Operation = "delete" // of any number of objects
	OpList   Operation = "list"   // of however many pages
)

// Operations lists them all.
func Operations() []Operation { return []Operation{OpGet, OpRead, OpPut, OpDelete, OpList} }

// A Result is how a request ended.
type Result string

// The results. What a store answers to a question is ResultOK, also that there is
// no such object, or that a condition does not hold.
const (
	ResultOK          Result = "ok"
	ResultThrottled   Result = "throttled"   // the store asks for fewer requests
	ResultUnavailable Result = "unavailable" // no answer, or it failed inside
	ResultDenied      Result = "denied"
	ResultCanceled    Result = "canceled" // nobody waited for it any more
	ResultError       Result = "error"
)

// Results lists them all.
func Results() []Result {
	return []Result{ResultOK, ResultThrottled, ResultUnavailable, ResultDenied, ResultCanceled, ResultError}
}

// A Request is one call of a Store that has ended.
type Request struct {
	Operation Operation
	Result    Result
	Took      time.Duration // of a List without what its function took
	Sent      int64         // bytes of objects, of whatever result
	Received  int64         // bytes of objects, of those that came
}

type observedStore struct {
	Store
	seen func(Request)
}

// Observe returns s with seen told of each call, when it has ended and in the
// goroutine that made it. Put it under Retry, to be told of each attempt, and under
// Limit, so that waiting for a turn does not count.
func Observe(s Store, seen func(Request)) Store { return &observedStore{s, seen} }

func (s *observedStore) ended(ctx context.Context, op Operation, begin time.Time, sent, received int64, err error) {
	s.seen(Request{op, result(ctx, err), time.Since(begin), sent, received})
}

// result judges the error of a call with the context ctx.
func result(ctx context.Context, err error) Result {
	switch {
	case err == nil:
		return ResultOK
	case ctx.Err() != nil:
		return ResultCanceled
	case errors.Is(err, ErrDenied):
		return ResultDenied
	case errors.Is(err, ErrUnavailable):
		if isThrottling(err) {
			return ResultThrottled
		}
		return ResultUnavailable
	}
	for _, answer := range []error{ErrNotExist, ErrExists, ErrChanged, ErrShort, ErrTooLarge} {
		if errors.Is(err, answer) {
			return ResultOK
		}
	}
	return ResultError
}

// isThrottling reports whether S3 refused a request because there are too many. Its
// "SlowDown" comes with 503, as do outages.
func isThrottling(err error) bool {
	if response := (*awshttp.ResponseError)(nil); errors.As(err, &response) && response.HTTPStatusCode() == http.StatusTooManyRequests {
		return true
	}
	if api := smithy.APIError(nil); errors.As(err, &api) {
		switch api.ErrorCode() {
		case "SlowDown", "Throttling", "TooManyRequests":
			return true
		}
	}
	return false
}

func (s *observedStore) Get(ctx context.Context, key string, limit int64) (data []byte, etag string, err error) {
	begin := time.Now()
	data, etag, err = s.Store.Get(ctx, key, limit)
	s.ended(ctx, OpGet, begin, 0, int64(len(data)), err)
	return data, etag, err
}

func (s *observedStore) ReadRange(ctx context.Context, key string, off int64, p []byte) error {
	begin := time.Now()
	err := s.Store.ReadRange(ctx, key, off, p)
	received := int64(len(p))
	if err != nil {
		received = 0
	}
	s.ended(ctx, OpRead, begin, 0, received, err)
	return err
}

func (s *observedStore) Put(ctx context.Context, key string, data []byte, c Condition) (string, error) {
	begin := time.Now()
	etag, err := s.Store.Put(ctx, key, data, c)
	s.ended(ctx, OpPut, begin, int64(len(data)), 0, err)
	return etag, err
}

func (s *observedStore) Delete(ctx context.Context, keys ...string) error {
	begin := time.Now()
	err := s.Store.Delete(ctx, keys...)
	s.ended(ctx, OpDelete, begin, 0, 0, err)
	return err
}

func (s *observedStore) List(ctx context.Context, prefix string, fn func(Info) error) error {
	return s.listAfter(ctx, prefix, "", fn)
}

func (s *observedStore) listAfter(ctx context.Context, prefix, after string, fn func(Info) error) error {
	begin := time.Now()
	var fnErr error // no answer of the store's
	err := listAfter(ctx, s.Store, prefix, after, func(info Info) error {
		called := time.Now()
		fnErr = fn(info)
		begin = begin.Add(time.Since(called))
		return fnErr
	})
	told := err
	if fnErr != nil {
		told = nil
	}
	s.ended(ctx, OpList, begin, 0, 0, told)
	return err
}
