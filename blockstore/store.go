package blockstore

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"
)

// The errors a Store reports, wrapped; test for them with [errors.Is]. Every
// other error is neither absence nor a verdict on the data.
var (
	// ErrNotExist: no object has this key. Never reported when it is the bucket
	// or the directory that is missing: that is ErrNoStore.
	ErrNotExist = errors.New("object does not exist")

	// ErrExists: a Put with IfAbsent found its key taken, possibly by this very
	// Put, when an earlier attempt was applied and its reply lost.
	ErrExists = errors.New("object already exists")

	// ErrChanged: a Put with IfMatch found the object replaced or gone.
	ErrChanged = errors.New("object was changed or removed")

	// ErrShort: a range reaches past the end of its object. A reply that broke
	// off is ErrUnavailable instead.
	ErrShort = errors.New("object is shorter than the range asked for")

	// ErrTooLarge: the object is larger than the limit given to Get, or the
	// data larger than MaxObjectSize.
	ErrTooLarge = errors.New("object is larger than allowed")

	// ErrDenied: the credentials are missing, wrong, or lack the permission.
	ErrDenied = errors.New("access denied")

	// ErrNoStore: the bucket, or the directory, does not exist.
	ErrNoStore = errors.New("store does not exist")

	// ErrUnavailable: the store could not be reached, did not answer in time,
	// was throttling, failed inside, or broke off while answering. Asking again
	// may succeed; whether a Put or Delete was applied is unknown.
	ErrUnavailable = errors.New("store is unavailable")

	// ErrKey: the key is not one that every store can hold (see CheckKey), or
	// it continues another object's key after a slash.
	ErrKey = errors.New("invalid object key")
)

const (
	// MaxKeyLen bounds a key, the store's prefix included, in bytes: S3's limit.
	MaxKeyLen = 1024

	// MaxObjectSize bounds the data of one Put, in bytes: twice the largest
	// pack, and far below the 5 GiB that S3 takes in one request.
	MaxObjectSize = 64 << 20

	// maxKeyPart bounds a key's part between slashes: Linux's limit on names.
	maxKeyPart = 255
)

// Info describes one object of a listing.
type Info struct {
	Key  string
	Size int64 // in bytes

	// ETag names the object's present content: equal to what Put returned
	// when writing it and what Get returns when reading it. It is opaque.
	ETag string

	// Age is how long ago the object was written by the store's own clock at
	// the time of the listing, never negative, exact to about a second.
	Age time.Duration

	// Listed is when it was listed, by the store's own clock, exact to about a
	// second; zero if the store does not tell.
	Listed time.Time
}

// A Condition restricts a Put. The zero Condition does not.
type Condition struct {
	kind conditionKind
	etag string
}

type conditionKind uint8

const (
	unconditional conditionKind = iota
	ifAbsent
	ifMatch
)

// IfAbsent is the condition that no object has the key. Of any number of
// concurrent Puts of one key with it, at most one succeeds, and the others
// report ErrExists.
var IfAbsent = Condition{kind: ifAbsent}

// IfMatch is the condition that the object exists with exactly this ETag. Of
// any number of concurrent Puts with the same ETag at most one succeeds, and
// the others report ErrChanged, also when the object is gone.
func IfMatch(etag string) Condition { return Condition{kind: ifMatch, etag: etag} }

// Absent reports whether the condition is IfAbsent.
func (c Condition) Absent() bool { return c.kind == ifAbsent }

// Match returns the ETag given to IfMatch, and whether the condition is one.
func (c Condition) Match() (etag string, ok bool) { return c.etag, c.kind == ifMatch }

// A Store holds objects under keys. All methods may be called concurrently.
// They return promptly once ctx is done, with an error that wraps
// context.Cause(ctx); whether a Put or Delete interrupted so was applied is
// unknown.
//
// Keys are checked with CheckKey. The errors are those listed above.
type Store interface {
	// Get returns a whole object and its ETag. An object larger than limit, or
	// than MaxObjectSize, is ErrTooLarge and is not read.
	Get(ctx context.Context, key string, limit int64) (data []byte, etag string, err error)

	// ReadRange fills p with the object's bytes from offset off, or fails;
	// what p holds after a failure is undefined. Bytes past the object's end
	// are ErrShort. An empty p succeeds without asking the store.
	ReadRange(ctx context.Context, key string, off int64, p []byte) error

	// Put writes an object whole: no reader ever sees a part of it, every Get
	// and List that begins after Put returned sees it, and it is durable. It
	// does not keep data. It returns the new ETag, which differs from that of
	// any other content the key ever had.
	//
	// After a lost reply it is unknown whether the Put was applied, and a
	// second attempt at a conditional one may find its own first one in the
	// way: ErrExists or ErrChanged. Callers to whom it matters read the object
	// and look for something only they would have written.
	Put(ctx context.Context, key string, data []byte, c Condition) (etag string, err error)

	// Delete removes objects, durably; absent ones are fine. After an error any
	// subset may have been removed.
	Delete(ctx context.Context, keys ...string) error

	// List calls fn for every object whose key begins with prefix, in
	// ascending byte order of the keys, until the last one or until fn fails;
	// fn's error is returned as it is. Objects written or deleted meanwhile
	// may or may not be seen; all others are seen exactly once. The prefix need
	// not end at a slash, and "" lists everything; fn may call the store.
	// Names in the bucket or directory that CheckKey refuses are passed over.
	List(ctx context.Context, prefix string, fn func(Info) error) error

	// String returns the store's URL, without secrets, for messages.
	String() string
}

// CheckKey reports, as ErrKey, why a key is not portable between stores: keys
// are 1 to MaxKeyLen bytes of ASCII letters, digits and "-_.=+@,:" in non-empty
// parts separated by "/". No part begins with a dot, which rules out ".." and
// leaves those names to the stores, or is longer than 255 bytes. Nor may one
// object's key continue another's after a slash: "a" and "a/b" exclude each
// other, which only the stores can see.
func CheckKey(key string) error {
	if key == "" {
		return fmt.Errorf("%w: it is empty", ErrKey)
	}
	if len(key) > MaxKeyLen {
		return fmt.Errorf("%w: %d bytes are more than %d", ErrKey, len(key), MaxKeyLen)
	}
	for part := range strings.SplitSeq(key, "/") {
		if err := checkKeyPart(part); err != nil {
			return fmt.Errorf("%w: %q %w", ErrKey, key, err)
		}
	}
	return nil
}

func checkKeyPart(part string) error {
	switch {
	case part == "":
		return errors.New("has an empty part")
	case part[0] == '.':
		return errors.New("has a part that begins with a dot")
	case len(part) > maxKeyPart:
		return fmt.Errorf("has a part of more than %d bytes", maxKeyPart)
	}
	for i := range len(part) {
		c := part[i]
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte("-_.=+@,:", c) >= 0) {
			return fmt.Errorf("has the character %q", c)
		}
	}
	return nil
}

// checkPrefix reports, as ErrKey, that no key can begin with the prefix.
func checkPrefix(prefix string) error {
	if prefix == "" {
		return nil
	}
	return CheckKey(strings.TrimSuffix(prefix, "/"))
}

// checkPut reports what is wrong with the arguments of a Put.
func checkPut(key string, data []byte) error {
	if err := CheckKey(key); err != nil {
		return err
	}
	if len(data) > MaxObjectSize {
		return fmt.Errorf("%w: %d bytes are more than %d", ErrTooLarge, len(data), MaxObjectSize)
	}
	return nil
}

// checkRange reports what is wrong with the arguments of a ReadRange.
func checkRange(key string, off int64, p []byte) error {
	if err := CheckKey(key); err != nil {
		return err
	}
	if off < 0 || off > math.MaxInt64-int64(len(p)) {
		return fmt.Errorf("%w: offset %d", ErrShort, off)
	}
	return nil
}

// opError says which call on which store failed; a nil err stays nil.
func opError(op string, s fmt.Stringer, key string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s %q in %s: %w", op, key, s, err)
}
