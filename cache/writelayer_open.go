package cache

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/internal/vfs"
)

const (
	dataName  = "data"
	mapPrefix = "map-" // and the generation in 16 hex digits
	tmpSuffix = ".tmp"

	// minLogLen is the length of a log, in bytes, below which it is never rotated:
	// half a million marks, replayed in some tens of milliseconds.
	minLogLen = 16 << 20
)

// CreateWriteLayer makes an empty layer for a device of size bytes in the folder
// dir, which it creates with mode 0700; the folder above must be durable. bootID,
// 1 to 64 bytes, names this start of the host, as /proc/sys/kernel/random/boot_id
// does. The layer is durable on return. What an interrupted creation has left is
// replaced; a layer that exists is fs.ErrExist. A filesystem that cannot hold a file
// of that size is syscall.EFBIG. key, if not nil, encrypts the layer.
func CreateWriteLayer(fsys vfs.FS, dir string, size int64, bootID string, key *crypt.Key) (_ *WriteLayer, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("create write layer %s: %w", dir, err)
		}
	}()
	if err := checkWriteLayer(size, bootID); err != nil {
		return nil, err
	}
	if err := fsys.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	generation, err := latestMap(fsys, dir)
	if err != nil {
		return nil, err
	}
	if generation != 0 {
		return nil, fmt.Errorf("%s: %w", mapName(generation), fs.ErrExist)
	}
	w := newWriteLayer(fsys, dir, size, bootID, key)
	w.data, err = fsys.OpenFile(w.path(dataName), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	if key != nil {
		w.encrypt(crypt.NewSectorSalt())
	}
	if err := w.format(); err != nil {
		return nil, errors.Join(err, w.data.Close())
	}
	return w, nil
}

// format gives a new layer its size and its first map.
func (w *WriteLayer) format() error {
	if err := sizeFile(w.data, w.size()); err != nil {
		return err
	}
	if err := w.data.Sync(); err != nil {
		return err
	}
	log, err := w.createMap(1, w.size(), nil)
	if err != nil {
		return err
	}
	if err := w.installMap(log); err != nil {
		return errors.Join(err, log.file.Close())
	}
	w.adopt(log)
	return nil
}

// OpenWriteLayer opens the layer in dir, which no other process may have open. size
// must be the device's; a layer of a smaller one that was extended to it grows. If
// bootID is the one under which the layer was written last, all that was ever
// written is there; otherwise what was synced is, and of the rest some. All that is
// there is durable on return. key is that of the device's lineage; nil: it is not
// encrypted.
//
// A folder without a layer is fs.ErrNotExist: creating it had not been finished. A
// damaged layer is manifest.ErrCorrupt, one of another version manifest.ErrVersion.
func OpenWriteLayer(fsys vfs.FS, dir string, size int64, bootID string, key *crypt.Key) (_ *WriteLayer, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("open write layer %s: %w", dir, err)
		}
	}()
	if err := checkWriteLayer(size, bootID); err != nil {
		return nil, err
	}
	generation, err := latestMap(fsys, dir)
	if err != nil {
		return nil, err
	}
	if generation == 0 {
		return nil, fmt.Errorf("no map: %w", fs.ErrNotExist)
	}
	w := newWriteLayer(fsys, dir, size, bootID, key)
	w.data, err = fsys.OpenFile(w.path(dataName), os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, corrupt("there is a map but no %s", dataName)
	}
	if err != nil {
		return nil, err
	}
	if err := w.recover(generation); err != nil {
		return nil, errors.Join(err, w.data.Close())
	}
	return w, nil
}

// load reads the state of the pages from a map file and makes their data durable,
// which a killed process may not have done.
func (w *WriteLayer) load(generation uint64) (err error) {
	f, err := w.fs.OpenFile(w.path(mapName(generation)), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	h, m, err := readCheckpoint(f, w.size())
	if err != nil {
		return err
	}
	if h.generation != generation {
		return corrupt("generation %d", h.generation)
	}
	if (h.salt != nil) != (w.key != nil) {
		return corrupt("encrypted: %t, and the volume: %t", h.salt != nil, w.key != nil)
	}
	if h.salt != nil {
		w.encrypt(h.salt)
	}
	if err := replay(f, h, m, h.bootID == w.bootID); err != nil {
		return err
	}
	w.pages.Store(m)
	if err := w.data.Sync(); err != nil {
		return errors.Join(err, h.disown(f))
	}
	return nil
}

// recover loads a map and replaces it by one that holds what was believed of it, so
// that what this process writes is judged by its own boot id alone.
func (w *WriteLayer) recover(generation uint64) error {
	if err := w.fit(w.size()); err != nil {
		return err
	}
	if err := w.load(generation); err != nil {
		return fmt.Errorf("%s: %w", mapName(generation), err)
	}
	log, err := w.createMap(generation+1, w.size(), w.pages.Load().freeze())
	if err != nil {
		return err
	}
	if err := w.installMap(log); err != nil {
		return errors.Join(err, log.file.Close())
	}
	if err := w.removeStale(generation + 1); err != nil {
		return errors.Join(err, log.file.Close())
	}
	w.adopt(log)
	return nil
}

// RemoveWriteLayer removes a layer that is not open. It is durably gone on return;
// what an interrupted removal leaves opens as fs.ErrNotExist or whole. A missing
// layer is fine.
func RemoveWriteLayer(fsys vfs.FS, dir string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("remove write layer %s: %w", dir, err)
		}
	}()
	names, err := fsys.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// The maps first, and the newest of these last: data without its map is no
	// layer, but a map without its data is damage.
	for _, name := range names {
		if _, ok := parseMapName(name); !ok {
			continue
		}
		if err := fsys.Remove(filepath.Join(dir, name)); err != nil {
			return err
		}
		if err := fsys.SyncDir(dir); err != nil {
			return err
		}
	}
	if err := fsys.RemoveAll(dir); err != nil {
		return err
	}
	return fsys.SyncDir(filepath.Dir(dir))
}

// encrypt makes the data file one of encrypted sectors.
func (w *WriteLayer) encrypt(salt []byte) {
	w.salt = salt
	w.data = newSectorFile(w.data, w.key.Sectors(salt))
}

func newWriteLayer(fsys vfs.FS, dir string, size int64, bootID string, key *crypt.Key) *WriteLayer {
	w := &WriteLayer{
		fs:     fsys,
		dir:    dir,
		bootID: bootID,
		key:    key,
		minLog: minLogLen,
	}
	w.pages.Store(newPageMap(size))
	return w
}

func checkWriteLayer(size int64, bootID string) error {
	if size < 0 || size > MaxWriteLayerSize {
		return fmt.Errorf("a device of %d bytes; 0 to %d are possible", size, int64(MaxWriteLayerSize))
	}
	if len(bootID) < 1 || len(bootID) > bootIDLen {
		return fmt.Errorf("boot id of %d bytes; 1 to %d are possible", len(bootID), bootIDLen)
	}
	return nil
}

// rotateIfFull replaces a log that has grown too long by a checkpoint. A rotation
// that fails, on a full disk for instance, leaves the old log in use, to be tried
// again when that has grown by as much as the smallest; unless durability is lost,
// which every later sync reports. It runs with syncMu held.
func (w *WriteLayer) rotateIfFull() {
	w.markMu.Lock()
	full := w.log.len() > w.rotateAt
	w.markMu.Unlock()
	if !full {
		return
	}
	if err := w.rotate(); err != nil {
		w.markMu.Lock()
		w.rotateAt = w.log.len() + w.minLog
		w.markMu.Unlock()
	}
}

// rotate replaces the map file while writes go on. It runs with syncMu held, so no
// barrier is appended meanwhile.
func (w *WriteLayer) rotate() error {
	w.markMu.Lock()
	size, extents := w.size(), w.pages.Load().freeze()
	from := w.log.end
	w.markMu.Unlock()
	if err := w.makeDurable(w.data); err != nil {
		return err
	}
	old := w.log
	log, err := w.createMap(old.header.generation+1, size, extents)
	if err != nil {
		return err
	}
	if err := w.replaceMap(log, from); err != nil {
		return errors.Join(err, w.abandonMap(log.file, log.header.generation))
	}
	w.finished = 0
	if err := w.fs.SyncDir(w.dir); err != nil {
		// After a power cut either map may be there, so a barrier in one of them
		// promises nothing.
		return errors.Join(w.fail(err), old.file.Close())
	}
	return errors.Join(old.file.Close(), w.fs.Remove(w.path(mapName(old.header.generation))))
}

// replaceMap copies the marks logged since the slot from into a new map and puts it
// in the place of the one in use. No barrier covers the copies, and no finished sync
// has promised them.
func (w *WriteLayer) replaceMap(log *markLog, from uint64) error {
	old := w.log
	w.markMu.Lock()
	to := old.end
	w.markMu.Unlock()
	// Most of them while writes go on, the rest while they wait.
	if err := log.appendFrom(old, from, to); err != nil {
		return err
	}
	w.markMu.Lock()
	defer w.markMu.Unlock()
	if err := log.appendFrom(old, to, old.end); err != nil {
		return err
	}
	if err := w.renameMap(log); err != nil {
		return err
	}
	w.adopt(log)
	return nil
}

// createMap writes a map file of the extents, of a device of size bytes, under a
// temporary name and makes its bytes durable.
func (w *WriteLayer) createMap(generation uint64, size int64, extents []extent) (*markLog, error) {
	var nonce [4]byte
	rand.Read(nonce[:]) // never fails: crypto/rand
	h := mapHeader{
		size:       size,
		generation: generation,
		nonce:      binary.LittleEndian.Uint32(nonce[:]),
		bootID:     w.bootID,
		salt:       w.salt,
	}
	f, err := w.fs.OpenFile(w.path(mapName(generation)+tmpSuffix), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	err = writeCheckpoint(f, &h, extents)
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		return nil, errors.Join(err, w.abandonMap(f, generation))
	}
	return newMarkLog(f, h), nil
}

// abandonMap gives up a map that has no name of its own yet.
func (w *WriteLayer) abandonMap(f vfs.File, generation uint64) error {
	return errors.Join(f.Close(), w.fs.Remove(w.path(mapName(generation)+tmpSuffix)))
}

func (w *WriteLayer) renameMap(log *markLog) error {
	name := w.path(mapName(log.header.generation))
	return w.fs.Rename(name+tmpSuffix, name)
}

// installMap gives a new map its name, durably; the folder's, too, which the process
// that created it may not have lived to do.
func (w *WriteLayer) installMap(log *markLog) error {
	if err := w.renameMap(log); err != nil {
		return err
	}
	if err := w.fs.SyncDir(w.dir); err != nil {
		return err
	}
	return w.fs.SyncDir(filepath.Dir(w.dir))
}

// adopt makes log the one in use. It runs with both locks held, or before the layer
// is anybody else's.
func (w *WriteLayer) adopt(log *markLog) {
	w.log = log
	w.rotateAt = max(w.minLog, 2*log.header.checkpointLen)
}

// removeStale removes maps older than generation and unfinished ones.
func (w *WriteLayer) removeStale(generation uint64) error {
	names, err := w.fs.ReadDir(w.dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		g, isMap := parseMapName(name)
		unfinished := strings.HasPrefix(name, mapPrefix) && strings.HasSuffix(name, tmpSuffix)
		if isMap && g < generation || unfinished {
			if err := w.fs.Remove(w.path(name)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *WriteLayer) path(name string) string { return filepath.Join(w.dir, name) }

// latestMap returns the highest generation of the maps in dir; 0: there is none.
func latestMap(fsys vfs.FS, dir string) (latest uint64, err error) {
	names, err := fsys.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	for _, name := range names {
		if g, ok := parseMapName(name); ok {
			latest = max(latest, g)
		}
	}
	return latest, nil
}

func mapName(generation uint64) string { return fmt.Sprintf("%s%016x", mapPrefix, generation) }

func parseMapName(name string) (uint64, bool) {
	digits, ok := strings.CutPrefix(name, mapPrefix)
	g, err := strconv.ParseUint(digits, 16, 64)
	return g, ok && err == nil && g > 0 && mapName(g) == name
}

// sizeFile gives a sparse file its size and explains a filesystem's refusal.
func sizeFile(f vfs.File, size int64) error {
	err := f.Truncate(size)
	if errors.Is(err, syscall.EFBIG) {
		return fmt.Errorf("the filesystem cannot hold a file as large as the device, %d bytes: %w", size, err)
	}
	return err
}
