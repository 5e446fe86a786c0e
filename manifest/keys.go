package manifest

import (
	"fmt"
	"strconv"
	"strings"
)

// The kinds of what a store holds: the first part of a key. Kind comes before id, so that one
// listing shows all of a kind, of the whole store or of one lineage. KindData are a snapshot's packs,
// leaves and root.
const (
	KindLineages   = "lineages"
	KindIntents    = "intents"
	KindProgress   = "progress"
	KindOutcomes   = "outcomes"
	KindTombstones = "tombstones"
	KindPins       = "pins"
	KindMeta       = "meta"
	KindTraces     = "traces"
	KindData       = "data"
)

// KindPrefix is what the keys of all objects of a kind begin with.
func KindPrefix(kind string) string { return kind + "/" }

// LineagePrefix is what the keys of all objects of a kind of one lineage begin with. The kind is
// one whose keys hold snapshot ids: any but KindLineages.
func LineagePrefix(kind string, l LineageID) string {
	return KindPrefix(kind) + snapshotPrefix + l.String()
}

func snapshotKey(kind string, s SnapshotID) string { return KindPrefix(kind) + s.String() }

// StoreKey is where the [StoreRecord] lies.
func StoreKey() string { return "store.json" }

// PolicyKey is where the [Policy] lies.
func PolicyKey() string { return "policy" }

// LineageKey is where a [LineageRecord] lies.
func LineageKey(l LineageID) string { return KindPrefix(KindLineages) + l.String() }

// IntentKey is where an [Intent] lies.
func IntentKey(s SnapshotID) string { return snapshotKey(KindIntents, s) }

// ProgressKey is where a [Progress] lies.
func ProgressKey(s SnapshotID) string { return snapshotKey(KindProgress, s) }

// OutcomeKey is where an [Outcome] lies.
func OutcomeKey(s SnapshotID) string { return snapshotKey(KindOutcomes, s) }

// TombstoneKey is where a [Tombstone] lies.
func TombstoneKey(s SnapshotID) string { return snapshotKey(KindTombstones, s) }

// MetaKey is where a [Meta] lies.
func MetaKey(s SnapshotID) string { return snapshotKey(KindMeta, s) }

// PinPrefix is what the keys of all pins on a snapshot begin with.
func PinPrefix(s SnapshotID) string { return snapshotKey(KindPins, s) + "/" }

// PinKey is where a holder's [Pin] on a snapshot lies. The holder is as [ValidName] says.
func PinKey(s SnapshotID, holder string) string { return PinPrefix(s) + holder }

// TraceKey is where a [Trace] of a snapshot lies. The name is as [ValidName] says.
func TraceKey(s SnapshotID, name string) string { return snapshotKey(KindTraces, s) + "/" + name }

// DataPrefix is what the keys of a snapshot's packs, leaves and root begin with.
func DataPrefix(s SnapshotID) string { return snapshotKey(KindData, s) + "/" }

// PackKey is where a snapshot's n-th pack lies, n at most [MaxPack].
func PackKey(s SnapshotID, n uint32) string { return numberedKey(s, packsFolder, n) }

// LeavesPrefix is what the keys of all parts of the leaves that a snapshot wrote begin with.
func LeavesPrefix(s SnapshotID) string { return DataPrefix(s) + leavesFolder }

// LeavesKey is where a part of the leaves and sections that a snapshot wrote lies: see
// [SplitOffset].
func LeavesKey(s SnapshotID, part uint32) string { return numberedKey(s, leavesFolder, part) }

// RootKey is where a snapshot's encoded [Root] lies.
func RootKey(s SnapshotID) string { return DataPrefix(s) + "root" }

const (
	packsFolder  = "packs/"
	leavesFolder = "leaves/"
	// numberDigits is how many decimal digits number an object, so that keys list in order.
	numberDigits = 8
	maxNumber    = 99_999_999
)

func numberedKey(s SnapshotID, folder string, n uint32) string {
	return fmt.Sprintf("%s%s%0*d", DataPrefix(s), folder, numberDigits, n)
}

// maxNameLen bounds the name of a pin's holder and that of a trace, in bytes.
const maxNameLen = 64

// ValidName reports whether s can name the holder of a pin, or a trace: 1 to 64 lower-case letters,
// digits and dashes, as a volume's id is.
func ValidName(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'z') && c != '-' {
			return false
		}
	}
	return len(s) >= 1 && len(s) <= maxNameLen
}

// ParseLineageKey is the inverse of [LineageKey]. Its error wraps [ErrID].
func ParseLineageKey(key string) (LineageID, error) {
	id, ok := strings.CutPrefix(key, KindPrefix(KindLineages))
	if !ok {
		return 0, fmt.Errorf("%w: key %q is not of kind %s", ErrID, key, KindLineages)
	}
	return ParseLineageID(id)
}

// ParseSnapshotKey returns the snapshot of a key like those of [IntentKey] and [OutcomeKey], which
// are a kind and a snapshot's id. Its error wraps [ErrID].
func ParseSnapshotKey(kind string, key string) (SnapshotID, error) {
	id, ok := strings.CutPrefix(key, KindPrefix(kind))
	if !ok {
		return SnapshotID{}, fmt.Errorf("%w: key %q is not of kind %s", ErrID, key, kind)
	}
	return ParseSnapshotID(id)
}

// ParsePinKey is the inverse of [PinKey]. Its error wraps [ErrID].
func ParsePinKey(key string) (s SnapshotID, holder string, err error) {
	id, holder, _ := strings.Cut(strings.TrimPrefix(key, KindPrefix(KindPins)), "/")
	s, err = ParseSnapshotID(id)
	if err != nil || key != PinKey(s, holder) || !ValidName(holder) {
		return SnapshotID{}, "", fmt.Errorf("%w: key %q is not a pin's", ErrID, key)
	}
	return s, holder, nil
}

// ParseTraceKey is the inverse of [TraceKey]. Its error wraps [ErrID].
func ParseTraceKey(key string) (s SnapshotID, name string, err error) {
	id, name, _ := strings.Cut(strings.TrimPrefix(key, KindPrefix(KindTraces)), "/")
	s, err = ParseSnapshotID(id)
	if err != nil || key != TraceKey(s, name) || !ValidName(name) {
		return SnapshotID{}, "", fmt.Errorf("%w: key %q is not a trace's", ErrID, key)
	}
	return s, name, nil
}

// ParsePackKey returns which of its owner's packs the key is that of: the inverse of [PackKey]. Its
// error wraps [ErrID].
func ParsePackKey(key string) (n uint32, err error) { return parseNumberedKey(key, packsFolder) }

// ParseLeavesKey returns which part of its owner's leaves the key is that of: the inverse of
// [LeavesKey]. Its error wraps [ErrID].
func ParseLeavesKey(key string) (part uint32, err error) { return parseNumberedKey(key, leavesFolder) }

func parseNumberedKey(key, folder string) (uint32, error) {
	id, name, _ := strings.Cut(strings.TrimPrefix(key, KindPrefix(KindData)), "/")
	s, errID := ParseSnapshotID(id)
	n, errNumber := strconv.ParseUint(strings.TrimPrefix(name, folder), 10, 32)
	if errID != nil || errNumber != nil || n > maxNumber || key != numberedKey(s, folder, uint32(n)) {
		return 0, fmt.Errorf("%w: key %q is not one of %s", ErrID, key, folder)
	}
	return uint32(n), nil
}
