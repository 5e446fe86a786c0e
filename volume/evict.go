package volume

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
)

// A reach is how far an eviction may go.
type reach int

const (
	idle   reach = iota // what nobody has open
	own                 // and the layers that this process has open
	shared              // and the bases that others have open
)

const (
	// nativeName is the lock file of a base that keeps it from being punched while
	// its data file is being given away, which takes it shared. An evictor holds it
	// exclusively.
	nativeName = "native"

	// openedName is the file with the time at which a base or clean layer was
	// opened last, in nanoseconds since 1970.
	openedName   = "opened"
	openedLength = 20

	// maxEvictErrors ends an eviction on a disk that fails.
	maxEvictErrors = 8
)

// An evictable is a clean layer that this process has open.
type evictable struct {
	*cache.Clean
	dir    string
	isBase bool                   // else it is a volume's own
	spare  func(block int64) bool // blocks that must stay
}

// A hand is where the evictor goes on, in one of the Budget's layers.
type hand struct {
	layer int
	block int64
}

// add makes a layer one that is evicted from, until remove, before which it must not
// be closed.
func (b *Budget) add(l *evictable) {
	if b == nil {
		return
	}
	b.evicting.Lock()
	defer b.evicting.Unlock()
	b.layers = append(b.layers, l)
}

func (b *Budget) remove(l *evictable) {
	if b == nil {
		return
	}
	b.evicting.Lock()
	defer b.evicting.Unlock()
	b.layers = slices.DeleteFunc(b.layers, func(other *evictable) bool { return other == l })
	b.hand = hand{}
}

// evict frees want bytes, or what can be, and returns how many it freed, roughly. It
// works on when something cannot be evicted. b.evicting is held.
func (b *Budget) evict(want int64, how reach) int64 {
	freed := b.evictIdle(want)
	if freed < want && how >= own {
		freed += b.evictOwn(want - freed)
	}
	if freed < want && how >= shared {
		freed += b.evictShared(want - freed)
	}
	if freed > 0 {
		b.rounds.Add(1)
		b.evicted.Add(freed)
		b.log.Debug("evicted clean bytes", "wanted", want, "freed", freed)
	}
	return freed
}

// An idler is a base or clean layer that nobody had open just now.
type idler struct {
	dir    string
	opened int64
	remove func(dir string) (freed int64, err error)
}

// evictIdle removes whole bases that nobody has open, and then whole clean layers of
// volumes that nobody has open, those opened least recently first.
func (b *Budget) evictIdle(want int64) int64 {
	var bases, layers []idler
	b.warn("list bases", b.eachBase(func(dir string) error {
		bases = append(bases, idler{dir, b.opened(dir), b.removeBase})
		return nil
	}))
	b.warn("list volumes", b.eachVolume(func(dir string) error {
		layers = append(layers, idler{dir, b.opened(cleanDir(dir)), b.removeClean})
		return nil
	}))
	oldestFirst := func(a, b idler) int { return cmp.Compare(a.opened, b.opened) }
	slices.SortStableFunc(bases, oldestFirst)
	slices.SortStableFunc(layers, oldestFirst)
	freed := int64(0)
	for _, i := range append(bases, layers...) {
		if freed >= want {
			break
		}
		n, err := i.remove(i.dir)
		if !errors.Is(err, vfs.ErrLocked) && !errors.Is(err, fs.ErrNotExist) {
			b.warn("evict "+i.dir, err)
		}
		freed += n
	}
	return freed
}

// removeBase removes a base that nobody has open. Who opens it meanwhile waits, and
// then makes it anew.
func (b *Budget) removeBase(dir string) (freed int64, err error) {
	lock, err := b.fs.Lock(filepath.Join(dir, lockName), true)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	if err := b.refuseGiven(dir); err != nil { // no space would be free
		return 0, err
	}
	size, err := cache.CleanAllocated(b.fs, dir)
	if err != nil {
		return 0, err
	}
	if err := vfs.RemoveLocked(b.fs, dir, lockName); err != nil {
		return 0, err
	}
	return size, nil
}

// removeClean removes the clean layer of the volume in the folder dir, unless the
// volume is open, and leaves what is known of diverged blocks. Whoever opens the
// volume next makes the folder durable before anything is written to the layer: so
// no former copy can come back after that.
func (b *Budget) removeClean(dir string) (freed int64, err error) {
	size, err := cache.CleanAllocated(b.fs, cleanDir(dir))
	if err != nil || size <= manifest.PageSize { // no more than a header
		return 0, err
	}
	lock, err := b.fs.Lock(filepath.Join(dir, lockName), true)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	if err := cache.RemoveClean(b.fs, cleanDir(dir)); err != nil {
		return 0, err
	}
	return size, nil
}

// evictOwn evicts blocks of the layers that this process has open, those used least
// recently first. Two rounds reach each block: the first may only note that it was
// not used since.
func (b *Budget) evictOwn(want int64) (freed int64) {
	if len(b.layers) == 0 {
		return 0
	}
	failures := 0
	for left := 2*len(b.layers) + 1; left > 0 && freed < want && failures < maxEvictErrors; {
		b.hand.layer %= len(b.layers)
		l := b.layers[b.hand.layer]
		next, n, err := b.evictFrom(l, b.hand.block, want-freed)
		freed += n
		b.hand.block = next
		if errors.Is(err, errors.ErrUnsupported) {
			b.hand.block = l.Blocks()
		} else if err != nil {
			failures++
			b.warn("evict blocks", err)
		}
		if b.hand.block >= l.Blocks() {
			b.hand = hand{layer: b.hand.layer + 1}
			left--
		}
	}
	return freed
}

// evictFrom evicts blocks of a layer from the given one on, none of a base that was
// given away.
func (b *Budget) evictFrom(l *evictable, from, want int64) (next, freed int64, err error) {
	if l.isBase {
		release, err := b.lockNative(l.dir)
		if errors.Is(err, vfs.ErrLocked) {
			return l.Blocks(), 0, nil
		}
		if err != nil {
			return l.Blocks(), 0, err
		}
		next, freed, err = l.EvictUnused(from, want, l.spare)
		return next, freed, errors.Join(err, release())
	}
	return l.EvictUnused(from, want, l.spare)
}

// evictShared evicts blocks of the bases that others have open: any of them, as it is
// not known which they use.
func (b *Budget) evictShared(want int64) (freed int64) {
	b.warn("list bases", b.eachBase(func(dir string) error {
		isOwn := slices.ContainsFunc(b.layers, func(l *evictable) bool { return l.dir == dir })
		if freed >= want || isOwn {
			return nil
		}
		n, err := b.evictSharedBase(dir, want-freed)
		freed += n
		if !errors.Is(err, vfs.ErrLocked) && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, errors.ErrUnsupported) {
			b.warn("evict blocks of "+dir, err)
		}
		return nil
	}))
	return freed
}

func (b *Budget) evictSharedBase(dir string, want int64) (freed int64, err error) {
	lock, err := b.fs.Lock(filepath.Join(dir, lockName), false)
	switch {
	case err == nil:
		defer func() { err = errors.Join(err, lock.Close()) }()
	case !vfs.IsFull(err): // else there is no lock file, so nobody has the base open
		return 0, err
	}
	g, err := cache.CleanGeometry(b.fs, dir)
	if errors.Is(err, manifest.ErrCorrupt) || errors.Is(err, fs.ErrNotExist) {
		return b.evictWhole(dir)
	}
	if err != nil {
		return 0, err
	}
	layer, err := cache.OpenClean(b.fs, dir, g, nil)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, layer.Close()) }()
	l := &evictable{Clean: layer, dir: dir, isBase: true}
	// The beginning last: partition tables and boot files lie there.
	_, freed, err = b.evictFrom(l, g.Blocks()/2, want)
	if err == nil && freed < want {
		var n int64
		_, n, err = b.evictFrom(l, 0, want-freed)
		freed += n
	}
	return freed, err
}

// evictWhole evicts all of a base that lacks its header, as after a power cut.
func (b *Budget) evictWhole(dir string) (freed int64, err error) {
	size, err := cache.CleanAllocated(b.fs, dir)
	if err != nil || size <= manifest.PageSize {
		return 0, err
	}
	release, err := b.lockNative(dir)
	if err != nil {
		return 0, err
	}
	return size, errors.Join(cache.EvictAll(b.fs, dir), release())
}

// lockNative makes sure that a base is not given away until release. vfs.ErrLocked:
// it was, or is being.
func (b *Budget) lockNative(dir string) (release func() error, err error) {
	native, err := b.fs.Lock(filepath.Join(dir, nativeName), true)
	switch {
	case err == nil:
		release = native.Close
	case vfs.IsFull(err): // there is no such file, so nobody holds it
		release = func() error { return nil }
	default:
		return nil, err
	}
	if err := b.refuseGiven(dir); err != nil {
		return nil, errors.Join(err, release())
	}
	return release, nil
}

// refuseGiven is vfs.ErrLocked for a base whose data file was given away: whoever
// has it knows nothing of checksums, and would see zeros where it is punched.
func (b *Budget) refuseGiven(dir string) error {
	names, err := b.fs.Links(cache.DataFile(dir))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case names > 1:
		return fmt.Errorf("%s is used without lazyvol: %w", dir, vfs.ErrLocked)
	}
	return nil
}

// eachBase calls do with the folder of each base of the host.
func (b *Budget) eachBase(do func(dir string) error) error {
	stores, err := b.names(basesDir(b.state))
	for _, store := range stores {
		var bases []string
		bases, err = b.names(filepath.Join(basesDir(b.state), store))
		for _, base := range bases {
			if err == nil {
				err = do(filepath.Join(basesDir(b.state), store, base))
			}
		}
		if err != nil {
			return err
		}
	}
	return err
}

// eachVolume calls do with the folder of each volume of the host.
func (b *Budget) eachVolume(do func(dir string) error) error {
	volumes, err := b.names(VolumesDir(b.state))
	for _, name := range volumes {
		if id, parseErr := manifest.ParseVolumeID(name); parseErr == nil && err == nil {
			err = do(Dir(b.state, id))
		}
	}
	return err
}

// names lists a folder; a missing one is empty.
func (b *Budget) names(dir string) ([]string, error) {
	names, err := b.fs.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return names, err
}

// opened returns when what is in a folder was opened last; 0: unknown.
func (b *Budget) opened(dir string) int64 {
	data, err := vfs.ReadFile(b.fs, filepath.Join(dir, openedName), openedLength)
	if err != nil {
		return 0
	}
	at, err := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
	if err != nil {
		return 0
	}
	return at
}

// noteOpened notes that what is in a folder was opened now. It only decides what is
// evicted first, so that it may fail, and is not made durable.
func (h *Host) noteOpened(dir string) {
	f, err := h.FS.OpenFile(filepath.Join(dir, openedName), writeCreate, 0o600)
	if err == nil {
		_, err = f.WriteAt(fmt.Appendf(nil, "%0*d\n", openedLength-1, time.Now().UnixNano()), 0)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		h.Log.Debug("could not note when this was opened", "folder", dir, "error", err)
	}
}

// shareBase lets the host's budget evict from the device's base, until unshare.
func (d *Device) shareBase() {
	d.share(&evictable{
		Clean: d.base.Clean, dir: d.base.dir, isBase: true,
		spare: func(int64) bool { return d.trusted() != nil },
	})
}

// shareWrites lets it evict from the volume's own clean layer.
func (d *Device) shareWrites() {
	d.share(&evictable{Clean: d.writes.clean, dir: d.writes.dir, spare: d.sparesOwn})
}

func (d *Device) share(l *evictable) {
	d.shared = append(d.shared, l)
	d.host.Budget.add(l)
}

func (d *Device) unshare() {
	for _, l := range d.shared {
		d.host.Budget.remove(l)
	}
	d.shared = nil
}

// sparesOwn reports whether a block must stay in the volume's own clean layer: a
// snapshot is being made of it, or it may be nowhere else any more. While the volume
// is being opened neither is known, and no snapshot is made.
func (d *Device) sparesOwn(block int64) bool {
	if !d.opened.Load() {
		return false
	}
	v := d.view.acquire()
	defer v.release()
	return d.trusted() != nil || d.seals(v, block)
}
