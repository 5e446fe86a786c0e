package volume

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// recordVersion is the version of volume.json this build writes and reads.
const recordVersion = 1

// A Record is a volume's volume.json: what must be known to open it, replaced
// as a whole and durably. Together with the outcomes in the store it says, after
// a crash, how far a snapshot of the volume got:
//
//   - one layer: none was being made;
//   - two layers and nothing pending: the older one was sealed, but may not
//     have been synced; it is merged back;
//   - two layers and a pending attempt: the store's outcome decides whether the
//     older layer is done with or merged back.
//
// Should replacing it fail, either version may be on the disk. So whatever
// follows a failure must be right for both: no layer that either names is
// removed, and none is written to that either lacks.
type Record struct {
	Version   int                `json:"version"`
	ID        manifest.VolumeID  `json:"id"`
	StoreURL  string             `json:"store"`
	StoreID   string             `json:"storeId"`
	Lineage   manifest.LineageID `json:"lineage,omitzero"`
	Size      int64              `json:"size"`
	BlockSize int                `json:"blockSize"`
	Created   time.Time          `json:"created"`

	// Encryption is the lineage's: the volume opens without asking the store. nil: not
	// encrypted.
	Encryption *manifest.Encryption `json:"encryption,omitempty"`

	// Creating says that Create has not finished: the pin may not stand.
	// Deleting says that Delete has begun: the pin may be gone, and files too.
	Creating bool `json:"creating,omitempty"`
	Deleting bool `json:"deleting,omitempty"`

	// Base is the snapshot the volume was created from, and BaseSize its size.
	Base     *manifest.SnapshotID `json:"base,omitempty"`
	BaseSize int64                `json:"baseSize,omitempty"`

	// Root is the snapshot through which cold blocks are read. The folder has
	// a copy of its root, as it is stored, which has this hash.
	Root     *manifest.SnapshotID `json:"root,omitempty"`
	RootHash manifest.HexHash     `json:"rootHash,omitzero"`

	Layers  []int64  `json:"layers"` // numbers of the write layers, oldest first; the last is open
	Pending *Pending `json:"pending,omitempty"`

	// Unpin are snapshots that the volume no longer reads through and whose
	// pins it has yet to remove.
	Unpin []manifest.SnapshotID `json:"unpin,omitempty"`

	// Checksum is the CRC32C, in hex, of the encoded record without it: a disk
	// that flips a bit of a layer's number must not make us take the layer for a
	// leftover.
	Checksum string `json:"checksum"`
}

// Pending is the attempt to snapshot the sealed layer.
type Pending struct {
	Snapshot manifest.SnapshotID `json:"snapshot"`
	Nonce    string              `json:"nonce"`
	Set      manifest.SetID      `json:"set,omitempty"` // whose outcome decides it; "": it has its own
}

const (
	recordName      = "volume.json"
	maxRecordLength = 1 << 20 // some 30,000 pins that could not be removed
)

// ErrNotFound: this state directory has no such volume.
var ErrNotFound = errors.New("volume not found")

// ReadRecord reads a volume's record. It may be called while another process
// has the volume open.
func ReadRecord(fsys vfs.FS, state string, id manifest.VolumeID) (Record, error) {
	data, err := vfs.ReadFile(fsys, filepath.Join(Dir(state, id), recordName), maxRecordLength)
	if errors.Is(err, fs.ErrNotExist) {
		return Record{}, fmt.Errorf("%w: %s has no %s", ErrNotFound, state, id)
	}
	if err != nil {
		return Record{}, fmt.Errorf("read the record of %s: %w", id, err)
	}
	r, err := decodeRecord(data)
	if err == nil && r.ID != id {
		err = fmt.Errorf("%w: it is that of %q", manifest.ErrCorrupt, r.ID)
	}
	if err != nil {
		return r, fmt.Errorf("read the record of %s: %w", id, err)
	}
	return r, nil
}

func decodeRecord(data []byte) (Record, error) {
	// The version first, and alone: another version's fields may be of other
	// types.
	var head struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(data, &head); err != nil {
		return Record{}, fmt.Errorf("%w: %w", manifest.ErrCorrupt, err)
	}
	if head.Version != recordVersion {
		return Record{}, fmt.Errorf("%w: version %d, and this build reads %d", manifest.ErrVersion, head.Version, recordVersion)
	}
	var r Record
	if err := json.Unmarshal(data, &r); err != nil {
		return r, fmt.Errorf("%w: %w", manifest.ErrCorrupt, err)
	}
	if encoded, err := r.encode(); err != nil || !bytes.Equal(encoded, data) {
		return r, fmt.Errorf("%w: its checksum is wrong", manifest.ErrCorrupt)
	}
	if r.Creating {
		return r, nil
	}
	if err := r.geometry().Validate(); err != nil {
		return r, fmt.Errorf("%w: %w", manifest.ErrCorrupt, err)
	}
	if n := len(r.Layers); n < 1 || n > 2 || n == 1 && r.Pending != nil {
		return r, fmt.Errorf("%w: %d write layers, a snapshot pending: %t", manifest.ErrCorrupt, n, r.Pending != nil)
	}
	return r, nil
}

// save replaces the record durably.
func (r *Record) save(fsys vfs.FS, dir string) error {
	data, err := r.encode()
	if err != nil {
		return err
	}
	if err := vfs.WriteFileAtomic(fsys, filepath.Join(dir, recordName), data); err != nil {
		return fmt.Errorf("write the record of %s: %w", r.ID, err)
	}
	return nil
}

// encode returns the record with its checksum.
func (r *Record) encode() ([]byte, error) {
	sealed := *r
	sealed.Checksum = ""
	data, err := json.Marshal(&sealed)
	if err != nil {
		return nil, err
	}
	sealed.Checksum = fmt.Sprintf("%08x", manifest.Checksum(data))
	if data, err = json.MarshalIndent(&sealed, "", "  "); err != nil {
		return nil, err
	}
	return append(data, '\n'), nil
}

// clone returns a copy that shares nothing which may change.
func (r *Record) clone() Record {
	c := *r
	c.Layers, c.Unpin = slices.Clone(r.Layers), slices.Clone(r.Unpin)
	return c
}

// lineage returns what of the lineage's record the volume has kept.
func (r *Record) lineage() manifest.LineageRecord {
	return manifest.LineageRecord{
		Version: manifest.RecordVersion, ID: r.Lineage, BlockSize: r.BlockSize, Created: r.Created, Encryption: r.Encryption,
	}
}

func (r *Record) geometry() manifest.Geometry {
	return manifest.Geometry{Size: r.Size, BlockSize: r.BlockSize}
}

// saveRoot keeps a copy of a root, durably, for opening the volume without
// asking the store.
func saveRoot(fsys vfs.FS, dir string, img *snapshot.Image) error {
	if err := vfs.WriteFileAtomic(fsys, rootPath(dir, img.ID()), img.StoredRoot()); err != nil {
		return fmt.Errorf("keep a copy of the root of %s: %w", img.ID(), err)
	}
	return nil
}

// root returns the image through which a volume reads, by the local copy of its root
// or, if that is damaged, the store's, which then takes its place.
func (h *Host) root(dir string, r *Record, key *crypt.Key) (*snapshot.Image, error) {
	id, hash := *r.Root, manifest.Hash(r.RootHash)
	data, err := vfs.ReadFile(h.FS, rootPath(dir, id), manifest.MaxRootLength+crypt.ObjectOverhead)
	if err == nil {
		var img *snapshot.Image
		if img, err = h.Store.ImageOf(id, data, hash, key); err == nil {
			return img, nil
		}
	}
	err = fmt.Errorf("read the local copy of the root of %s: %w", id, err)
	h.Log.Warn("fetching a root again", "snapshot", id, "error", err)
	ctx, cancel := context.WithTimeoutCause(context.Background(), h.ReadDeadline, errDeadline)
	defer cancel()
	data, fetchErr := h.Store.RootOf(ctx, id)
	if fetchErr != nil {
		return nil, errors.Join(err, fetchErr)
	}
	img, fetchErr := h.Store.ImageOf(id, data, hash, key)
	if fetchErr != nil {
		return nil, errors.Join(err, fmt.Errorf("the root of %s in %s is another one: %w", id, h.Store, fetchErr))
	}
	if saveErr := saveRoot(h.mustKeep(), dir, img); saveErr != nil {
		return nil, errors.Join(err, saveErr)
	}
	return img, nil
}

const rootPrefix = "root-" // and the snapshot's id

func rootPath(dir string, id manifest.SnapshotID) string {
	return filepath.Join(dir, rootPrefix+id.String())
}

func layersDir(dir string) string { return filepath.Join(dir, "layers") }

func layerDir(dir string, n int64) string {
	return filepath.Join(layersDir(dir), strconv.FormatInt(n, 10))
}

// List returns the records of the volumes of a state directory, oldest first;
// one that cannot be read is in failed. Folders without a record are volumes
// that come or go just now.
func List(fsys vfs.FS, state string) (records []Record, failed []error, err error) {
	names, err := fsys.ReadDir(VolumesDir(state))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, fmt.Errorf("list volumes: %w", err)
	}
	for _, name := range names {
		id, err := manifest.ParseVolumeID(name)
		if err != nil {
			continue
		}
		switch r, err := ReadRecord(fsys, state, id); {
		case err == nil:
			records = append(records, r)
		case !errors.Is(err, ErrNotFound):
			failed = append(failed, err)
		}
	}
	slices.SortFunc(records, func(a, b Record) int { return a.Created.Compare(b.Created) })
	return records, failed, nil
}
