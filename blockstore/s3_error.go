package blockstore

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"time"

	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"
)

// bodyError is an error met while reading a response's body.
type bodyError struct{ err error }

func (e *bodyError) Error() string { return "read response: " + e.err.Error() }
func (e *bodyError) Unwrap() error { return e.err }

// s3Error adds the sentinel that a failed request means, which had the condition
// c. The end of ctx, the caller's own, goes before everything else.
func s3Error(ctx context.Context, err error, c Condition) error {
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%w: %w", context.Cause(ctx), err)
	}
	var (
		status int
		code   string
		after  time.Duration
	)
	if response := (*awshttp.ResponseError)(nil); errors.As(err, &response) {
		status, after = response.HTTPStatusCode(), retryAfter(response.HTTPResponse())
	}
	if api := smithy.APIError(nil); errors.As(err, &api) {
		code = api.ErrorCode()
	}
	if kind := sentinel(status, code, c); kind == ErrUnavailable && after > 0 {
		return &laterError{withSentinel(kind, err), after}
	} else if kind != nil {
		return withSentinel(kind, err)
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		// The limit on one request. %v, as it is not the caller's context that ended.
		return fmt.Errorf("%w: no answer in time: %v", ErrUnavailable, err)
	case brokeOff(err), status/100 == 2 && code == "": // the latter: a response that turned to garbage
		return withSentinel(ErrUnavailable, err)
	}
	return err
}

// retryAfter returns how long a response asks to wait before the next request; 0: it
// does not say so in seconds, which is how S3 servers do.
func retryAfter(r *smithyhttp.Response) time.Duration {
	if r == nil || r.Response == nil {
		return 0
	}
	seconds, err := strconv.ParseUint(r.Header.Get("Retry-After"), 10, 31)
	if err != nil {
		return 0
	}
	return time.Duration(seconds) * time.Second
}

// withSentinel returns err, which is also kind unless that is nil.
func withSentinel(kind, err error) error {
	if kind == nil {
		return err
	}
	return fmt.Errorf("%w: %w", kind, err)
}

// sentinel returns what a response's error code and status mean to a request
// with the condition c, or nil; a zero status is none. Codes go first: 404 alone
// does not say what is missing, and some codes come with several statuses. See
// https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html.
func sentinel(status int, code string, c Condition) error {
	_, match := c.Match()
	switch code {
	case "NoSuchKey":
		if match {
			return ErrChanged // it is gone
		}
		return ErrNotExist
	case "NoSuchBucket":
		return ErrNoStore
	case "InvalidRange":
		return ErrShort
	case "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestTimeTooSkewed",
		"ExpiredToken", "InvalidToken", "TokenRefreshRequired":
		return ErrDenied
	case "SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "Throttling", "TooManyRequests":
		return ErrUnavailable
	}
	switch status {
	case http.StatusPreconditionFailed:
		if c.Absent() {
			return ErrExists
		}
		if match {
			return ErrChanged
		}
	case http.StatusUnauthorized, http.StatusForbidden:
		return ErrDenied
	case http.StatusRequestedRangeNotSatisfiable:
		return ErrShort
	case http.StatusConflict: // another write was under way; nothing is decided
		return ErrUnavailable
	case http.StatusTooManyRequests, http.StatusInternalServerError, http.StatusBadGateway,
		http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return ErrUnavailable
	}
	return nil
}

// brokeOff reports whether a request failed on the way: it got no connection, no
// response, or half of one, if only of one that says why it is refused.
func brokeOff(err error) bool {
	var (
		certificate *tls.CertificateVerificationError
		send        *smithyhttp.RequestSendError
		body        *bodyError
		connection  *net.OpError
	)
	if errors.As(err, &certificate) {
		return false // asking again will not change it
	}
	return errors.As(err, &send) || errors.As(err, &body) || errors.As(err, &connection) || errors.Is(err, io.ErrUnexpectedEOF)
}
