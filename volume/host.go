package volume

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// A Host is what the devices of one process share. Its fields are set before
// its first use and not changed after.
type Host struct {
	FS    vfs.FS
	State string // the state directory, which exists
	Store *snapshot.Store
	Name  string // of the host, for pins
	Boot  string // id of the running boot: of what another one wrote only what was synced is believed

	// Leaves caches decoded leaves for all devices. It is closed after them.
	Leaves *cache.Leaves

	// Demand and Background are the store as reads and as the hydrator and
	// snapshots use it: each with its own limit on requests at once, so that
	// background work cannot take the slots of a read. Both try again while
	// the store is unavailable, Demand for as long as ReadDeadline at least.
	Demand, Background blockstore.Store

	// ReadDeadline is how long a read of a missing block waits for the store
	// before it fails with EIO; more than 0.
	ReadDeadline time.Duration

	// ReadAhead is how many bytes are fetched ahead of a sequential reader at a
	// time, in one device; as much again may be on its way. 0 is none.
	ReadAhead int64

	// UploadMemory is how many bytes of buffers making a snapshot takes, about;
	// 0 is what is best.
	UploadMemory int64

	// Budget bounds the clean bytes, and evicts some when the disk is full; nil does
	// neither. It is this process's own.
	Budget *Budget

	Log *slog.Logger
}

// BootID returns the id of the running boot.
func BootID() (string, error) {
	data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("find out which boot this is: %w", err)
	}
	return strings.TrimSpace(string(data)), nil
}

// VolumesDir is the folder of all volumes of a state directory.
func VolumesDir(state string) string { return filepath.Join(state, "volumes") }

// Dir is a volume's folder.
func Dir(state string, id manifest.VolumeID) string {
	return filepath.Join(VolumesDir(state), string(id))
}

// SessionsDir is the folder of the read-only sessions of a state directory.
func SessionsDir(state string) string { return filepath.Join(state, "mounts") }

// basesDir is the folder of all bases of a state directory, those of each store in
// one of their own.
func basesDir(state string) string { return filepath.Join(state, "bases") }

func (h *Host) baseDir(storeID string, id manifest.SnapshotID) string {
	return filepath.Join(basesDir(h.State), storeID, id.String())
}

// indexPath is the file of the leaves that are kept beside the clean layer in a
// folder.
func indexPath(dir string) string { return filepath.Join(dir, "index") }

// cleanDir is the folder of a volume's own clean layer.
func cleanDir(dir string) string { return filepath.Join(dir, "clean") }
