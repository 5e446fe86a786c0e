package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/crypt"
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
func (e usageError) Unwrap() error      { return e.error }

// errCombination: options that exclude each other.
var errCombination = fmt.Errorf("%w: options that do not go together", errUsage)

// combinationError names options that exclude each other, in its own words.
type combinationError struct{ error }

func (combinationError) Is(target error) bool { return target == errCombination || target == errUsage }
func (e combinationError) Unwrap() error      { return e.error }

// refusal is a refusal by state, with its own words.
type refusal struct{ error }

func (refusal) Is(target error) bool { return target == errRefused }
func (e refusal) Unwrap() error      { return e.error }

// codedError is an error that comes with its exit code.
type codedError struct {
	message string
	code    int
}

func (e codedError) Error() string { return e.message }

// remoteError is an error that another process found out, with its codes.
type remoteError struct{ report report }

func (e remoteError) Error() string { return e.report.Error }

// failure is the report of an error.
func failure(err error) report {
	code, exit := judge(err)
	return report{Error: err.Error(), Code: exit, EBSCode: code}
}

// A verdict is what an error means to scripts. The first one of a list that fits
// an error holds.
type verdict struct {
	err  error
	code string // EBS's, or EC2's, for the same refusal, and ": " and its reason; "" where they have none
	exit int
}

// verdicts is the only table from errors to codes and exit codes.
var verdicts = []verdict{
	{errInterrupted, "", exitInterrupted},
	{manifest.ErrCorrupt, "", exitFailed}, // also of an id in a record

	{manifest.ErrSnapshotID, "InvalidSnapshotID.Malformed", exitUsage},
	{manifest.ErrVolumeID, "InvalidVolumeID.Malformed", exitUsage},
	{manifest.ErrTooManyTags, "TagLimitExceeded", exitRefused},
	{manifest.ErrTags, "InvalidParameterValue", exitUsage},
	{manifest.ErrDescription, "InvalidParameterValue", exitUsage},
	{manifest.ErrOwner, "InvalidParameterValue", exitUsage},
	{errCombination, "InvalidParameterCombination", exitUsage},
	{volume.ErrSize, "InvalidParameterValue", exitUsage},
	{volume.ErrTooSmall, "InvalidParameterValue", exitRefused},
	{crypt.ErrKeyURI, "ValidationException: INVALID_CUSTOMER_KEY", exitUsage},
	{errUsage, "", exitUsage},
	{manifest.ErrID, "", exitUsage},

	{manifest.ErrAccount, "InvalidUserID.Malformed", exitUsage},
	{snapshot.ErrLock, "InvalidParameterValue", exitUsage},
	{snapshot.ErrRetention, "InvalidParameterValue", exitUsage},

	{snapshot.ErrLocked, "SnapshotLocked", exitRefused}, // EBS publishes no code for it
	{snapshot.ErrNotLocked, "IncorrectState", exitRefused},
	{snapshot.ErrNotInBin, "IncorrectState", exitRefused},
	{snapshot.ErrNotPermitted, "OperationNotPermitted", exitRefused},
	{snapshot.ErrPending, "IncorrectState", exitRefused},
	{snapshot.ErrUnrelated, "ValidationException: UNRELATED_SNAPSHOTS", exitRefused},
	{volume.ErrInUse, "VolumeInUse", exitRefused},
	{volume.ErrShrink, "InvalidParameterValue", exitRefused},
	{volume.ErrBusy, "ConcurrentSnapshotLimitExceeded", exitRefused},
	{volume.ErrOtherStore, "", exitRefused},
	{fs.ErrBusy, "", exitRefused},
	{loopdev.ErrBusy, "", exitRefused},
	{crypt.ErrKeyDisabled, "ValidationException: INVALID_CUSTOMER_KEY", exitRefused},
	{crypt.ErrWrongKey, "ValidationException: INVALID_CUSTOMER_KEY", exitRefused},
	{snapshot.ErrPinned, "InvalidSnapshot.InUse", exitRefused},
	{snapshot.ErrNotEncrypted, "InvalidParameterValue", exitRefused},
	{snapshot.ErrShredded, "ValidationException: INVALID_CUSTOMER_KEY", exitRefused},
	{errRefused, "", exitRefused},

	{snapshot.ErrNotFound, "InvalidSnapshot.NotFound", exitNotFound},
	{snapshot.ErrAborted, "InvalidSnapshot.NotFound", exitNotFound},
	{snapshot.ErrParentGone, "InvalidSnapshot.NotFound", exitNotFound},
	{volume.ErrNotFound, "InvalidVolume.NotFound", exitNotFound},
	{crypt.ErrKeyNotFound, "ResourceNotFoundException: DEPENDENCY_RESOURCE_NOT_FOUND", exitNotFound},
	{snapshot.ErrNotStore, "", exitNotFound},
	{blockstore.ErrNoStore, "", exitNotFound},

	{blockstore.ErrDenied, "UnauthorizedOperation", exitFailed},
	{crypt.ErrKeyDenied, "AccessDeniedException: DEPENDENCY_ACCESS_DENIED", exitFailed},
}

// exitCode returns the exit code of an error.
func exitCode(err error) int {
	_, exit := judge(err)
	return exit
}

// judge is the only place where errors become codes and exit codes. code is ""
// where EBS has none.
func judge(err error) (code string, exit int) {
	if err == nil {
		return "", exitDone
	}
	if remote := (remoteError{}); errors.As(err, &remote) {
		return remote.report.EBSCode, remote.report.Code
	}
	if coded := (codedError{}); errors.As(err, &coded) {
		return "", coded.code
	}
	for _, v := range verdicts {
		if errors.Is(err, v.err) {
			return v.code, v.exit
		}
	}
	return "", exitFailed
}

// generalCodes are the codes by exit code of errors that have none of their own:
// with --json there always is one.
var generalCodes = map[int]string{
	exitFailed:      "InternalError",
	exitUsage:       "InvalidParameterValue",
	exitNotFound:    "ResourceNotFoundException",
	exitRefused:     "IncorrectState",
	exitInterrupted: "Interrupted",
}

// errorJSON is an error as scripts read it.
type errorJSON struct {
	Error struct {
		Code    string
		Reason  string `json:",omitempty"` // beside a ValidationException
		Message string
	}
}

// printError shows what a command failed with: as one line of JSON to scripts, the
// last on stderr, else to people.
func printError(w io.Writer, err error, asJSON bool) {
	code, exit := judge(err)
	if asJSON {
		var e errorJSON
		e.Error.Code, e.Error.Reason, _ = strings.Cut(cmp.Or(code, generalCodes[exit]), ": ")
		e.Error.Message = err.Error()
		_ = json.NewEncoder(w).Encode(e) // nobody is left to be told
		return
	}
	if code != "" {
		code = " (" + code + ")"
	}
	fmt.Fprintf(w, "lazyvol: %s%s\n", printable(err.Error()), code) // some of it is the store's
}

// wantsJSON reports whether a command was told to print JSON. One whose command
// line could not be parsed was if the flag is there.
func wantsJSON(c *cobra.Command, args []string, err error) bool {
	flag := c.Flags().Lookup("json")
	return flag != nil && flag.Value.String() == "true" || errors.Is(err, errUsage) && slices.Contains(args, "--json")
}

func isAny(err error, targets ...error) bool {
	for _, target := range targets {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}
