package manifest

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

var (
	// ErrID is wrapped by the error for text that is not an id of the kind asked for.
	ErrID = errors.New("malformed id")

	// ErrSnapshotID is the ErrID of a snapshot's.
	ErrSnapshotID = fmt.Errorf("%w: snapshot", ErrID)

	// ErrVolumeID is the ErrID of a volume's.
	ErrVolumeID = fmt.Errorf("%w: volume", ErrID)
)

const (
	snapshotPrefix = "snap-"
	volumePrefix   = "vol-"

	lineageDigits = 8
	serialDigits  = 9
	// idDigits is the number of hex digits after an id's prefix, as in EC2's ids.
	idDigits = lineageDigits + serialDigits
)

// MaxSerial is the greatest serial of a snapshot: nine hex digits.
const MaxSerial = 1<<(4*serialDigits) - 1

// A LineageID names a lineage within its store. It prints as 8 lower-case hex digits. Zero is no
// lineage: it is neither drawn nor parsed.
type LineageID uint32

// NewLineageID draws a random id. It may be taken in a given store: the create-once lineage record
// tells, and then another one is drawn.
func NewLineageID() LineageID {
	return LineageID(randomBits(4 * lineageDigits))
}

// ParseLineageID is the inverse of [LineageID.String]. Its error wraps [ErrID].
func ParseLineageID(s string) (LineageID, error) {
	n, ok := parseHex(s, lineageDigits)
	if !ok || n == 0 {
		return 0, fmt.Errorf("%w: lineage %q", ErrID, s)
	}
	return LineageID(n), nil
}

func (l LineageID) String() string {
	return fmt.Sprintf("%0*x", lineageDigits, uint32(l))
}

// MarshalText returns what String does. The zero id has no text.
func (l LineageID) MarshalText() ([]byte, error) {
	if l == 0 {
		return nil, fmt.Errorf("%w: zero lineage", ErrID)
	}
	return []byte(l.String()), nil
}

// UnmarshalText is [ParseLineageID].
func (l *LineageID) UnmarshalText(text []byte) (err error) {
	*l, err = ParseLineageID(string(text))
	return err
}

// A SnapshotID names a snapshot within its store: its lineage, and a serial in [1, MaxSerial] that
// is drawn at random. It prints as "snap-" and 17 lower-case hex digits, the lineage's 8 first.
// SnapshotIDs are comparable; the zero SnapshotID is no snapshot.
type SnapshotID struct {
	Lineage LineageID
	Serial  uint64
}

// NewSnapshotID draws a random id in a lineage. It may be taken: the create-once intent tells, and
// then another one is drawn.
func NewSnapshotID(l LineageID) SnapshotID {
	return SnapshotID{Lineage: l, Serial: randomBits(4 * serialDigits)}
}

// ParseSnapshotID is the inverse of [SnapshotID.String]. Its error wraps [ErrID].
func ParseSnapshotID(s string) (SnapshotID, error) {
	digits, ok := strings.CutPrefix(s, snapshotPrefix)
	if !ok || len(digits) != idDigits {
		return SnapshotID{}, fmt.Errorf("%w %q", ErrSnapshotID, s)
	}
	lineage, okLineage := parseHex(digits[:lineageDigits], lineageDigits)
	serial, okSerial := parseHex(digits[lineageDigits:], serialDigits)
	id := SnapshotID{Lineage: LineageID(lineage), Serial: serial}
	if !okLineage || !okSerial || !id.Valid() {
		return SnapshotID{}, fmt.Errorf("%w %q", ErrSnapshotID, s)
	}
	return id, nil
}

// IsZero reports whether s is the zero SnapshotID, which names no snapshot.
func (s SnapshotID) IsZero() bool { return s == SnapshotID{} }

// Valid reports whether s can name a snapshot: it has a lineage, and a serial within bounds.
func (s SnapshotID) Valid() bool { return s.Lineage != 0 && validSerial(s.Serial) }

func validSerial(serial uint64) bool { return serial >= 1 && serial <= MaxSerial }

func (s SnapshotID) String() string {
	return fmt.Sprintf("%s%s%0*x", snapshotPrefix, s.Lineage, serialDigits, s.Serial)
}

// MarshalText returns what String does. An id that names no snapshot has no text.
func (s SnapshotID) MarshalText() ([]byte, error) {
	if !s.Valid() {
		return nil, fmt.Errorf("%w %s", ErrSnapshotID, s)
	}
	return []byte(s.String()), nil
}

// UnmarshalText is [ParseSnapshotID].
func (s *SnapshotID) UnmarshalText(text []byte) (err error) {
	*s, err = ParseSnapshotID(string(text))
	return err
}

// A VolumeID names a volume: "vol-" and 17 lower-case hex digits. The empty VolumeID is no volume.
type VolumeID string

// NewVolumeID draws a random id: 68 bits, so that it is taken nowhere.
func NewVolumeID() VolumeID {
	var b [(idDigits + 1) / 2]byte
	rand.Read(b[:]) // never fails: see crypto/rand
	return VolumeID(volumePrefix + hex.EncodeToString(b[:])[:idDigits])
}

// ParseVolumeID checks that s is a volume's id. Its error wraps [ErrID].
func ParseVolumeID(s string) (VolumeID, error) {
	digits, ok := strings.CutPrefix(s, volumePrefix)
	if !ok || len(digits) != idDigits || !isHex(digits) {
		return "", fmt.Errorf("%w %q", ErrVolumeID, s)
	}
	return VolumeID(s), nil
}

// UnmarshalText is [ParseVolumeID].
func (v *VolumeID) UnmarshalText(text []byte) (err error) {
	*v, err = ParseVolumeID(string(text))
	return err
}

// nonceLen is the length of a nonce in bytes; it is written as twice as many hex digits.
const nonceLen = 16

// NewNonce draws 128 random bits, written as 32 lower-case hex digits: the id of a store, or what
// tells one attempt to commit from another.
func NewNonce() string {
	var b [nonceLen]byte
	rand.Read(b[:]) // never fails: see crypto/rand
	return hex.EncodeToString(b[:])
}

func validNonce(s string) bool { return len(s) == 2*nonceLen && isHex(s) }

// randomBits draws a uniformly random number of at most n bits that is not zero.
func randomBits(n int) uint64 {
	for {
		var b [8]byte
		rand.Read(b[:]) // never fails: see crypto/rand
		if v := binary.LittleEndian.Uint64(b[:]) >> (64 - n); v != 0 {
			return v
		}
	}
}

// parseHex parses exactly n lower-case hex digits, n at most 16.
func parseHex(s string, n int) (uint64, bool) {
	if len(s) != n || !isHex(s) {
		return 0, false
	}
	v, err := strconv.ParseUint(s, 16, 64)
	return v, err == nil
}

// isHex reports whether s is lower-case hex digits only. Upper case is refused everywhere: an id
// has one spelling, since it is part of keys.
func isHex(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}
