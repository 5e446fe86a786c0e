package manifest

import (
	"encoding/json"
	"fmt"
	"time"
)

const (
	// RecordVersion is the version of every record that this build writes, and the only one that it
	// reads.
	RecordVersion = 1

	// MaxRecordLength bounds an encoded record, in bytes.
	MaxRecordLength = 1 << 20

	// InlineRootMax is the length up to which a root is also held in its snapshot's outcome, in
	// bytes: enough for 160 GiB in blocks of the default size, and one request fewer to mount.
	InlineRootMax = 16 << 10
)

// The states of an [Outcome].
const (
	StateCommitted = "committed"
	StateAborted   = "aborted"
)

// A StoreRecord identifies a store. It is created once.
type StoreRecord struct {
	Version int    `json:"version"`
	ID      string `json:"id"` // as [NewNonce] draws it
}

// A LineageRecord holds what all snapshots of a lineage share. It is created once.
type LineageRecord struct {
	Version    int         `json:"version"`
	ID         LineageID   `json:"id"`
	BlockSize  int         `json:"blockSize"` // in bytes
	Created    time.Time   `json:"created"`
	Encryption *Encryption `json:"encryption,omitempty"` // nil: not encrypted

	CopyOf *LineageOrigin `json:"copyOf,omitempty"` // nil: its snapshots were made here
}

// Encryption says how to get at the data key of an encrypted lineage.
type Encryption struct {
	KeyURI     string `json:"keyUri"`               // the key that wraps the data key
	WrappedKey []byte `json:"wrappedKey,omitempty"` // the data key, wrapped; empty if Shredded

	// Shredded says that the wrapped key was destroyed, and the lineage with it.
	Shredded bool `json:"shredded,omitempty"`
}

// An Intent is created once, before anything else of a snapshot: from then on reclaim leaves alone
// what the snapshot uploads and what it inherits from its parent.
type Intent struct {
	Version     int               `json:"version"`
	Snapshot    SnapshotID        `json:"snapshot"`
	Parent      *SnapshotID       `json:"parent,omitempty"` // nil: a first snapshot
	Volume      VolumeID          `json:"volume,omitempty"` // empty: of an image or a device
	Size        int64             `json:"size"`             // in bytes
	BlockSize   int               `json:"blockSize"`        // in bytes
	Nonce       string            `json:"nonce"`            // of the attempt: see [NewNonce]
	Start       time.Time         `json:"start"`
	Owner       string            `json:"owner,omitempty"` // who made it: see [CheckOwner]; empty: whoever has the store
	Description string            `json:"description,omitempty"`
	Tags        map[string]string `json:"tags,omitempty"`
	Set         SetID             `json:"set,omitempty"`        // whose outcome decides the attempt's; empty: it has its own
	CopiedFrom  *CopySource       `json:"copiedFrom,omitempty"` // nil: it is no copy
}

// An Outcome is created once and ends an attempt: the snapshot is committed, or aborted and will
// never be. The fields that an intent has too are copied from it, as far as who aborts knows it; those
// from RootHash on are zero unless committed.
type Outcome struct {
	Version     int               `json:"version"`
	Snapshot    SnapshotID        `json:"snapshot"`
	State       string            `json:"state"`           // StateCommitted or StateAborted
	Nonce       string            `json:"nonce,omitempty"` // of the attempt; an aborted one's may be unknown
	Why         string            `json:"why,omitempty"`   // aborted: the reason, for people
	Parent      *SnapshotID       `json:"parent,omitempty"`
	Volume      VolumeID          `json:"volume,omitempty"`
	Size        int64             `json:"size"`           // in bytes
	BlockSize   int               `json:"blockSize"`      // in bytes
	Start       time.Time         `json:"start,omitzero"` // when the intent was made
	End         time.Time         `json:"end"`            // when the outcome was made
	Owner       string            `json:"owner,omitempty"`
	Description string            `json:"description,omitempty"`
	Tags        map[string]string `json:"tags,omitempty"`       // those it was made with: Meta has changes
	Set         SetID             `json:"set,omitempty"`        // the one it belongs to, whose outcome it is part of
	CopiedFrom  *CopySource       `json:"copiedFrom,omitempty"` // nil: it is no copy

	RootHash       HexHash `json:"rootHash,omitzero"`        // of the encoded root
	RootLength     int64   `json:"rootLength,omitempty"`     // of the encoded root, in bytes
	Root           []byte  `json:"root,omitempty"`           // the encoded root, if ≤ InlineRootMax
	DataBlocks     int64   `json:"dataBlocks,omitempty"`     // blocks that are not holes
	UploadedBlocks int64   `json:"uploadedBlocks,omitempty"` // blocks uploaded, not inherited
	StoredBytes    int64   `json:"storedBytes,omitempty"`    // of all objects uploaded
	LeavesLength   int64   `json:"leavesLength,omitempty"`   // of the parts of leaves uploaded, in bytes
	Packs          int64   `json:"packs,omitempty"`          // uploaded
}

// A Tombstone is created once and deletes a committed snapshot: nobody may newly pin it, nor inherit
// from it.
type Tombstone struct {
	Version  int        `json:"version"`
	Snapshot SnapshotID `json:"snapshot"`
	Deleted  time.Time  `json:"deleted"`
}

// A Pin keeps a snapshot whole as long as it stands. Its holder removes it.
type Pin struct {
	Version   int        `json:"version"`
	Snapshot  SnapshotID `json:"snapshot"`
	Holder    string     `json:"holder"`              // as in its key: see [ValidName]
	Host      string     `json:"host,omitempty"`      // the holder's, for people
	Unchecked bool       `json:"unchecked,omitempty"` // it may have come after the tombstone: its holder must not count on it
	Mounted   time.Time  `json:"mounted"`
}

// A Meta holds what of a snapshot may change. It is replaced by compare-and-swap; while there is
// none, the outcome's tags hold.
type Meta struct {
	Version int               `json:"version"`
	Tags    map[string]string `json:"tags,omitempty"`
	Lock    *Lock             `json:"lock,omitempty"`
	Bin     *Bin              `json:"bin,omitempty"`    // nil: not deleted
	Shares  []string          `json:"shares,omitempty"` // accounts, ascending: see [CheckAccount]
}

// A Progress is overwritten by the owner of a pending snapshot, to show that it goes on.
type Progress struct {
	Version   int        `json:"version"`
	Snapshot  SnapshotID `json:"snapshot"`
	Percent   int        `json:"percent"` // 0 to 100
	Heartbeat time.Time  `json:"heartbeat"`
}

// A record is one of the types above.
type record interface {
	version() int
	// validate reports, as an error for people, what of the record is not as specified.
	validate() error
}

// EncodeRecord encodes a record, which is one of this package's, by value. It is an error if its
// Version is not [RecordVersion] or it is not as docs/format.md specifies, and then the message
// says why: what it returns can be decoded again.
func EncodeRecord(v any) ([]byte, error) {
	r, ok := v.(record)
	if !ok {
		return nil, fmt.Errorf("encode record: %T is none", v)
	}
	if r.version() != RecordVersion {
		return nil, fmt.Errorf("encode %T: %w: version %d, and this build writes %d", v, ErrVersion, r.version(), RecordVersion)
	}
	if err := r.validate(); err != nil {
		return nil, fmt.Errorf("encode %T: %w", v, err)
	}
	data, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode %T: %w", v, err)
	}
	if len(data) > MaxRecordLength {
		return nil, fmt.Errorf("encode %T: %d bytes are more than %d", v, len(data), MaxRecordLength)
	}
	return data, nil
}

// DecodeRecord decodes and validates a record of type T, which is one of this package's. Fields it
// does not know are ignored: a writer whose new fields must not be raises the version. It allocates
// at most a small multiple of len(data), which may not exceed [MaxRecordLength]. Its error wraps
// [ErrVersion] if the record is of another version, else [ErrCorrupt].
func DecodeRecord[T any](data []byte) (T, error) {
	var none, decoded T
	if len(data) > MaxRecordLength {
		return none, corrupt(fmt.Sprintf("%T", none), "%d bytes are more than %d", len(data), MaxRecordLength)
	}
	// The version first, and alone: another version's fields may be of other types.
	var head struct {
		Version *int `json:"version"`
	}
	if err := json.Unmarshal(data, &head); err != nil {
		return none, fmt.Errorf("%T: %w: %w", none, ErrCorrupt, err)
	}
	if head.Version == nil {
		return none, corrupt(fmt.Sprintf("%T", none), "no version")
	}
	if *head.Version != RecordVersion {
		return none, fmt.Errorf("%T: %w: version %d, and this build reads %d", none, ErrVersion, *head.Version, RecordVersion)
	}
	if err := json.Unmarshal(data, &decoded); err != nil {
		return none, fmt.Errorf("%T: %w: %w", none, ErrCorrupt, err)
	}
	r, ok := any(decoded).(record)
	if !ok {
		return none, fmt.Errorf("decode record: %T is none", none)
	}
	if err := r.validate(); err != nil {
		return none, fmt.Errorf("%T: %w: %w", none, ErrCorrupt, err)
	}
	return decoded, nil
}
