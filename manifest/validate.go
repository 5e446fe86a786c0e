package manifest

import (
	"cmp"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"
)

// The bounds of what people attach to a snapshot, in characters: EBS's.
const (
	MaxTags              = 50
	MaxTagKeyLength      = 128
	MaxTagValueLength    = 256
	MaxDescriptionLength = 255

	// MaxOwnerLength bounds the name of a snapshot's owner: as S3's canonical user ids.
	MaxOwnerLength = 64

	reservedTagPrefix = "aws:"
)

// Bounds of other texts in records, in bytes.
const (
	maxHostLength       = 255 // of a DNS name
	maxKeyURILength     = 2 << 10
	maxWrappedKeyLength = 64 << 10
)

var (
	// ErrTags is wrapped by the errors of [CheckTags].
	ErrTags = errors.New("invalid tags")
	// ErrTooManyTags is the ErrTags of more than [MaxTags].
	ErrTooManyTags = fmt.Errorf("%w: too many", ErrTags)
	// ErrDescription is wrapped by the errors of [CheckDescription].
	ErrDescription = errors.New("invalid description")
	// ErrOwner is wrapped by the errors of [CheckOwner].
	ErrOwner = errors.New("invalid owner")
)

// CheckTags reports whether tags can be attached to a snapshot: at most [MaxTags], keys of 1 to
// [MaxTagKeyLength] characters that do not begin with "aws:", values of at most
// [MaxTagValueLength], all of it UTF-8. Its error wraps [ErrTags].
func CheckTags(tags map[string]string) error {
	if len(tags) > MaxTags {
		return fmt.Errorf("%w: %d are more than %d", ErrTooManyTags, len(tags), MaxTags)
	}
	for key, value := range tags {
		switch {
		case key == "" || !validText(key, MaxTagKeyLength):
			return fmt.Errorf("%w: key %.200q is not 1 to %d characters", ErrTags, key, MaxTagKeyLength)
		case strings.HasPrefix(key, reservedTagPrefix):
			return fmt.Errorf("%w: key %q begins with %q", ErrTags, key, reservedTagPrefix)
		case !validText(value, MaxTagValueLength):
			return fmt.Errorf("%w: value of %q is not at most %d characters", ErrTags, key, MaxTagValueLength)
		}
	}
	return nil
}

// CheckDescription reports whether s is UTF-8 and at most [MaxDescriptionLength] characters. Its
// error wraps [ErrDescription].
func CheckDescription(s string) error {
	if !validText(s, MaxDescriptionLength) {
		return fmt.Errorf("%w: it is not at most %d characters", ErrDescription, MaxDescriptionLength)
	}
	return nil
}

// CheckOwner reports whether s can name the owner of a snapshot, such as 123456789012 or
// backup@example.org: 1 to [MaxOwnerLength] ASCII letters, digits and any of "-_.@". Not "self", which
// asks for one's own. Its error wraps [ErrOwner].
func CheckOwner(s string) error {
	valid := s != "" && len(s) <= MaxOwnerLength && s != "self"
	for i := range len(s) {
		c := s[i]
		valid = valid && ('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte("-_.@", c) >= 0)
	}
	if !valid {
		return fmt.Errorf("%w: %.200q is not 1 to %d letters, digits and any of -_.@ (and not self)", ErrOwner, s, MaxOwnerLength)
	}
	return nil
}

// checkRecordedOwner is CheckOwner for a record, which may have none.
func checkRecordedOwner(s string) error {
	if s == "" {
		return nil
	}
	return CheckOwner(s)
}

func validText(s string, maxChars int) bool {
	return utf8.ValidString(s) && utf8.RuneCountInString(s) <= maxChars
}

func (r StoreRecord) version() int   { return r.Version }
func (r LineageRecord) version() int { return r.Version }
func (r Intent) version() int        { return r.Version }
func (r Outcome) version() int       { return r.Version }
func (r Tombstone) version() int     { return r.Version }
func (r Pin) version() int           { return r.Version }
func (r Meta) version() int          { return r.Version }
func (r Progress) version() int      { return r.Version }

func (r StoreRecord) validate() error {
	return check(validNonce(r.ID), "id", r.ID)
}

func (r LineageRecord) validate() error {
	var encryption error
	if e := r.Encryption; e != nil {
		encryption = cmp.Or(
			check(e.KeyURI != "" && len(e.KeyURI) <= maxKeyURILength, "key URI", e.KeyURI),
			check((len(e.WrappedKey) == 0) == e.Shredded && len(e.WrappedKey) <= maxWrappedKeyLength, "wrapped key's length", len(e.WrappedKey)),
		)
	}
	return cmp.Or(
		check(r.ID != 0, "id", r.ID),
		check(validBlockSize(r.BlockSize), "block size", r.BlockSize),
		checkTime("created", r.Created),
		encryption,
		r.CopyOf.validate(),
	)
}

func (r Intent) validate() error {
	return cmp.Or(
		checkSnapshot(r.Snapshot),
		checkOrigin(r.Snapshot, r.Parent, r.Volume),
		Geometry{Size: r.Size, BlockSize: r.BlockSize}.Validate(),
		check(validNonce(r.Nonce), "nonce", r.Nonce),
		checkTime("start", r.Start),
		checkRecordedOwner(r.Owner),
		CheckDescription(r.Description),
		CheckTags(r.Tags),
		checkSet(r.Set),
		r.CopiedFrom.validate(),
	)
}

func (r Outcome) validate() error {
	err := cmp.Or(
		checkSnapshot(r.Snapshot),
		checkOrigin(r.Snapshot, r.Parent, r.Volume),
		checkTime("end", r.End),
		checkRecordedOwner(r.Owner),
		CheckDescription(r.Description),
		CheckTags(r.Tags),
		checkSet(r.Set),
		r.CopiedFrom.validate(),
	)
	if err != nil {
		return err
	}
	switch r.State {
	case StateCommitted:
		return r.validateCommitted()
	case StateAborted:
		return r.validateAborted()
	default:
		return check(false, "state", r.State)
	}
}

func (r Outcome) validateCommitted() error {
	blocks := Geometry{Size: r.Size, BlockSize: r.BlockSize}
	if err := blocks.Validate(); err != nil {
		return err
	}
	inline := len(r.Root) == 0 ||
		len(r.Root) <= InlineRootMax && int64(len(r.Root)) == r.RootLength && HexHash(Sum(r.Root)) == r.RootHash
	return cmp.Or(
		check(validNonce(r.Nonce), "nonce", r.Nonce),
		checkTime("start", r.Start),
		check(r.Why == "", "why", r.Why),
		check(r.RootHash != HexHash{}, "root hash", r.RootHash),
		check(r.RootLength >= minRootLength && r.RootLength <= MaxRootLength, "root length", r.RootLength),
		check(inline, "inline root's length or hash", len(r.Root)),
		check(r.DataBlocks >= 0 && r.DataBlocks <= blocks.Blocks(), "data blocks", r.DataBlocks),
		check(r.UploadedBlocks >= 0 && r.UploadedBlocks <= r.DataBlocks, "uploaded blocks", r.UploadedBlocks),
		check(r.Packs >= 0 && r.Packs <= MaxPack+1, "packs", r.Packs),
		check(r.LeavesLength >= 0 && r.LeavesLength <= maxLeavesLength, "leaves length", r.LeavesLength),
		check(r.StoredBytes >= 0, "stored bytes", r.StoredBytes),
	)
}

// validateAborted asks for less: who aborts an attempt may know its id only.
func (r Outcome) validateAborted() error {
	return cmp.Or(
		check(r.Nonce == "" || validNonce(r.Nonce), "nonce", r.Nonce),
		check(r.Size >= 0, "size", r.Size),
		check(r.BlockSize >= 0, "block size", r.BlockSize),
		check(r.RootHash == HexHash{} && r.RootLength == 0 && len(r.Root) == 0, "root of an aborted snapshot", r.RootHash),
	)
}

func (r Tombstone) validate() error {
	return cmp.Or(checkSnapshot(r.Snapshot), checkTime("deleted", r.Deleted))
}

func (r Pin) validate() error {
	return cmp.Or(
		checkSnapshot(r.Snapshot),
		check(ValidName(r.Holder), "holder", r.Holder),
		check(len(r.Host) <= maxHostLength, "host", r.Host),
		checkTime("mounted", r.Mounted),
	)
}

func (r Meta) validate() error {
	return cmp.Or(CheckTags(r.Tags), r.Lock.validate(), r.Bin.validate(), validateShares(r.Shares))
}

func (r Progress) validate() error {
	return cmp.Or(
		checkSnapshot(r.Snapshot),
		check(r.Percent >= 0 && r.Percent <= 100, "percent", r.Percent),
		checkTime("heartbeat", r.Heartbeat),
	)
}

// check says which field has an invalid value, unless it is valid. Of which record, EncodeRecord and
// DecodeRecord add.
func check(valid bool, field string, value any) error {
	if valid {
		return nil
	}
	return fmt.Errorf("%s %.200q is invalid", field, fmt.Sprint(value))
}

func checkSnapshot(id SnapshotID) error { return check(id.Valid(), "snapshot", id) }

// checkOrigin checks what a snapshot was made from. Its parent, if it has one, is another of its
// lineage: nothing is shared between lineages.
func checkOrigin(id SnapshotID, parent *SnapshotID, volume VolumeID) error {
	if parent != nil && (!parent.Valid() || parent.Lineage != id.Lineage || *parent == id) {
		return check(false, "parent", *parent)
	}
	if volume != "" {
		if _, err := ParseVolumeID(string(volume)); err != nil {
			return err
		}
	}
	return nil
}

// checkTime asks for a time that was set and that JSON can hold: RFC 3339 has years of four digits.
func checkTime(field string, t time.Time) error {
	return check(!t.IsZero() && t.Year() >= 0 && t.Year() <= 9999, field, t)
}
