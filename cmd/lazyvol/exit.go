package main

import (
	"errors"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/fs"
	"github.com/lazyvol/lazyvol/internal/loopdev"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
	"github.com/lazyvol/lazyvol/volume"
)

// The exit codes, which scripts rely on.
const (
	exitDone        = 0
	exitFailed      = 1
	exitUsage       = 2
	exitNotFound    = 3
	exitRefused     = 4 // by the state of things: in use, pending, exists
	exitInterrupted = 130
)

// errRefused: what was asked does not fit the state of things.
var errRefused = errors.New("refused")

// errUsage: the command line is wrong.
var errUsage = errors.New("usage")

// usageError is a wrong command line, with its own words.
type usageError struct{ error }

func (usageError) Is(target error) bool { return target == errUsage }

// refusal is a refusal by state, with its own words.
type refusal struct{ error }

func (refusal) Is(target error) bool { return target == errRefused }

// codedError is an error whose exit code another process found out.
type codedError struct {
	message string
	code    int
}

func (e codedError) Error() string { return e.message }

// exitCode is the only place where errors become exit codes.
func exitCode(err error) int {
	var coded codedError
	switch {
	case err == nil:
		return exitDone
	case errors.As(err, &coded):
		return coded.code
	case isAny(err, errInterrupted):
		return exitInterrupted
	case isAny(err, manifest.ErrCorrupt, blockstore.ErrCorrupt): // also of an id in a record
		return exitFailed
	case isAny(err, errUsage, manifest.ErrID, manifest.ErrTags, volume.ErrSize):
		return exitUsage
	case isAny(err, snapshot.ErrPending, volume.ErrInUse, volume.ErrBusy, volume.ErrOtherStore, fs.ErrBusy, loopdev.ErrBusy, errRefused, snapshot.ErrUnrelated):
		return exitRefused
	case isAny(err, snapshot.ErrNotFound, volume.ErrNotFound, snapshot.ErrAborted, snapshot.ErrParentGone, snapshot.ErrNotStore, blockstore.ErrNoStore):
		return exitNotFound
	}
	return exitFailed
}

func isAny(err error, targets ...error) bool {
	for _, target := range targets {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}
