package blockstore

import (
	"errors"
	"time"
)

// Later makes of an error that of a server which says how long to wait.
func Later(err error, after time.Duration) error { return &laterError{err, after} }

// AskedPause returns how long the server says to wait; 0: it does not.
func AskedPause(err error) time.Duration {
	if asked := (*laterError)(nil); errors.As(err, &asked) {
		return asked.after
	}
	return 0
}

// For the fuzz tests of what is read from outside.
var (
	ParseURL          = parseURL
	ParseContentRange = parseContentRange
)
