package volume

import (
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
)

// A patient is a volume whose files are damaged: of four blocks, it has the first
// from its base, the second and third from its clean layer, and of the fourth a
// part in its write layer. All is cached, and synced.
type patient struct {
	*world
	id   manifest.VolumeID
	v    *Volume
	data []byte
}

func newPatient(t *testing.T) *patient {
	w := newWorld(t, 1)
	p := &patient{world: w}
	p.v, p.data = newRestored(w, 4)
	p.id = p.v.Record().ID
	p.set(noise(2*blockSize, 2), blockSize)
	w.snapshot(p.v)
	p.set(noise(2*pageSize, 3), 3*blockSize+pageSize)
	w.must(w.hydrate(p.v.Device))
	w.must(p.v.Sync(w.ctx))
	w.must(errors.Join(p.v.base.Sync(), p.v.writes.clean.Sync()))
	p.whole("before any damage")
	return p
}

func (p *patient) set(data []byte, off int64) {
	p.Helper()
	p.write(p.v, data, off)
	copy(p.data[off:], data)
}

func (p *patient) whole(what string) {
	p.Helper()
	p.equal(p.v.Device, p.data, what)
	p.eventually("what was fetched is kept", func() bool { return p.v.DemandInFlight() == 0 })
}

func (p *patient) reopen() {
	p.Helper()
	p.must(p.v.Close())
	p.v = p.open(p.id)
}

// end closes the volume and ends the process.
func (p *patient) end() {
	p.Helper()
	p.must(p.v.Close())
	p.world.end()
}

// files returns the files that hold clean copies, and what they are.
func (p *patient) files() map[string]string {
	clean := filepath.Join(p.v.dir, "clean")
	return map[string]string{
		"base data": filepath.Join(p.v.base.dir, "data"), "base map": filepath.Join(p.v.base.dir, "map"),
		"clean data": filepath.Join(clean, "data"), "clean map": filepath.Join(clean, "map"),
		"clean index": filepath.Join(clean, "index"),
	}
}

// allocated yields the offsets in a file, one in each sector that is no hole.
func (p *patient) allocated(name string) []int64 {
	p.Helper()
	f, err := p.crash.OpenFile(name, 0, 0)
	p.must(err)
	defer func() { p.must(f.Close()) }()
	var all []int64
	for off := int64(0); ; {
		data, err := f.SeekData(off)
		if err != nil {
			return all
		}
		hole, err := f.SeekHole(data)
		p.must(err)
		for off = data; off < hole; off += manifest.SectorSize {
			all = append(all, off)
		}
	}
}

// damages are what can become of a sector of a clean copy.
func (p *patient) damages() map[string]func(name string, off int64) error {
	return map[string]func(name string, off int64) error{"bad sector": p.crash.BadSector, "flipped bit": p.crash.FlipBit}
}

// TestDamagedCleanCopyIsReadRightAndHeals damages each sector of the clean copies,
// one after the other. Whatever it is, each read is right, of a device that is open
// and of one that is opened then; and of what was damaged in the data nothing is
// left, so that the next read asks the store for nothing.
func TestDamagedCleanCopyIsReadRightAndHeals(t *testing.T) {
	p := newPatient(t)
	names := p.files()
	for _, kind := range slices.Sorted(maps.Keys(names)) {
		offs := p.allocated(names[kind])
		if len(offs) == 0 {
			t.Errorf("%s has no content", kind)
		}
		for damage, do := range p.damages() {
			for i := 0; i < len(offs); i += 1 + len(offs)/24 {
				what := fmt.Sprintf("%s at %d of %s", damage, offs[i], kind)
				p.must(do(names[kind], offs[i]))
				p.whole(what)
				p.whole(what + ", again")
				p.store.Reset()
				p.whole(what + ", healed")
				if n := p.packGets(); n > 0 && (strings.HasSuffix(kind, "data") || damage == "flipped bit") {
					t.Errorf("%s: %d requests after it should have healed", what, n)
				}
				if i%2 == 0 {
					p.reopen()
					p.whole(what + ", opened again")
				}
			}
			// What lies in a bad sector of a map is fetched each time. A new disk:
			if strings.HasSuffix(kind, "index") {
				continue // its leaf is in memory: nobody would write it anew
			}
			p.must(p.crash.RemoveAll(names[kind]))
			p.reopen()
			p.must(p.hydrate(p.v.Device))
			p.whole(kind + " made anew")
		}
	}
	p.equalSnapshot(p.snapshot(p.v), p.data, "the snapshot after all that")
	p.end()
}

// TestDamagedCleanCopyDoesNotReachASnapshot damages the clean copies of blocks that
// are changed in part, which a snapshot then assembles.
func TestDamagedCleanCopyDoesNotReachASnapshot(t *testing.T) {
	p := newPatient(t)
	n := uint64(10)
	for _, kind := range []string{"base data", "base map", "clean data", "clean map"} {
		for damage, do := range p.damages() {
			name := p.files()[kind]
			offs := p.allocated(name)
			p.must(do(name, offs[len(offs)/2]))
			for block := range int64(4) {
				n++
				p.set(noise(700, n), block*blockSize+300)
			}
			p.equalSnapshot(p.snapshot(p.v), p.data, damage+" of "+kind)
			p.whole(damage + " of " + kind)
		}
	}
	p.end()
}

// TestBadSectorOfTheOnlyCopyHurtsNothingElse: what cannot be read of the only copy is EIO,
// which tells where, and nothing else is lost for it.
func TestBadSectorOfTheOnlyCopyHurtsNothingElse(t *testing.T) {
	p := newPatient(t)
	name := filepath.Join(layerDir(p.v.dir, p.v.Record().Layers[0]), "data")
	const bad = 3*blockSize + 2*pageSize + 1024 // in the second page of two
	p.must(p.crash.BadSector(name, bad))

	got := make([]byte, len(p.data))
	isNamed := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, syscall.EIO) || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), fmt.Sprint(bad)) {
			t.Errorf("%s: %v, want EIO that names %s and %d", what, err, name, bad)
		}
	}
	_, err := p.v.ReadAt(p.ctx, got[:manifest.SectorSize], bad)
	isNamed("read of the sector", err)
	for off := 0; off < len(got); off += manifest.SectorSize {
		if off == bad {
			continue
		}
		if _, err := p.v.ReadAt(p.ctx, got[off:off+manifest.SectorSize], int64(off)); err != nil {
			t.Fatalf("read of the sector at %d: %v", off, err)
		}
	}
	copy(got[bad:], p.data[bad:bad+manifest.SectorSize])
	if i := firstDifference(got, p.data); i >= 0 {
		t.Errorf("wrong at %d", i)
	}

	root := *p.v.Record().Root
	for range 2 { // it fails, and keeps the changes, each time
		if _, err := p.v.Snapshot(p.ctx, SnapshotOptions{}); !errors.Is(err, syscall.EIO) {
			t.Errorf("snapshot: %v, want EIO", err)
		}
	}
	if now := *p.v.Record().Root; now != root {
		t.Errorf("the root is %s after a snapshot that failed, was %s", now, root)
	}
	p.wantNonePending()
	p.powerCut()
	p.v = p.open(p.id)
	_, err = p.v.ReadAt(p.ctx, got[:1], bad)
	if !errors.Is(err, syscall.EIO) {
		t.Errorf("read after a power cut: %v, want EIO", err)
	}
	p.set(noise(manifest.SectorSize, 9), bad) // as a guest does that gets EIO
	p.whole("written anew")
	p.equalSnapshot(p.snapshot(p.v), p.data, "its snapshot")
	p.end()
}

// TestBadSectorOfAMapOfAWriteLayerLosesNothing: a volume whose map cannot be read
// does not open, and says why.
func TestBadSectorOfAMapOfAWriteLayerLosesNothing(t *testing.T) {
	p := newPatient(t)
	dir := layerDir(p.v.dir, p.v.Record().Layers[0])
	p.must(p.v.Close())
	names, err := p.crash.ReadDir(dir)
	p.must(err)
	name := filepath.Join(dir, names[slices.IndexFunc(names, func(s string) bool { return strings.HasPrefix(s, "map-") })])
	for _, off := range []int64{0, pageSize} { // header and checkpoint, log
		content, err := vfs.ReadFile(p.crash, name, 1<<20)
		p.must(err)
		p.must(p.crash.BadSector(name, off))
		if _, err := p.host.OpenVolume(p.id); !errors.Is(err, syscall.EIO) || !strings.Contains(err.Error(), name) {
			t.Fatalf("bad sector at %d of %s: open: %v, want EIO that names it", off, name, err)
		}
		f, err := p.crash.OpenFile(name, 2, 0)
		p.must(err)
		_, err = f.WriteAt(content[off:min(off+manifest.SectorSize, int64(len(content)))], off)
		p.must(errors.Join(err, f.Close()))
	}
	p.v = p.open(p.id)
	p.whole("with a map that can be read again")
	p.end()
}

// TestFlippedBitInARecordIsFound flips each bit of what a volume knows of itself.
// It then does not open, and says so. Of its root there is another copy in the store,
// so that it may also open, and show what it held.
func TestFlippedBitInARecordIsFound(t *testing.T) {
	p := newPatient(t)
	record, root := filepath.Join(p.v.dir, recordName), rootPath(p.v.dir, *p.v.Record().Root)
	p.must(p.v.Close())
	isFound := func(err error) bool {
		return errors.Is(err, manifest.ErrCorrupt) || errors.Is(err, manifest.ErrVersion)
	}
	for _, name := range []string{record, root, filepath.Join(p.v.dir, "clean", "diverged")} {
		content, err := vfs.ReadFile(p.crash, name, 1<<20)
		p.must(err)
		found := 0
		for i := range content {
			for bit := range 8 {
				if (i+bit)%thinning != 0 {
					continue
				}
				what := fmt.Sprintf("byte %d, bit %d of %s", i, bit, name)
				damaged := slices.Clone(content)
				damaged[i] ^= 1 << bit
				p.must(vfs.WriteFileAtomic(p.crash, name, damaged))
				if name == record {
					if _, err := ReadRecord(p.crash, p.host.State, p.id); !isFound(err) {
						t.Fatalf("%s, %q: read: %v, want manifest.ErrCorrupt", what, damaged[max(0, i-20):min(len(damaged), i+20)], err)
					}
				}
				switch v, err := p.host.OpenVolume(p.id); {
				case isFound(err):
					found++
				case err != nil || name != root:
					t.Fatalf("%s: open: %v, want manifest.ErrCorrupt", what, err)
				default:
					p.equal(v.Device, p.data, what)
					p.must(v.Close())
				}
			}
		}
		t.Logf("%s: %d of %d flipped bits found", filepath.Base(name), found, 8*len(content)/thinning)
		p.must(vfs.WriteFileAtomic(p.crash, name, content))
	}
	p.v = p.open(p.id)
	p.whole("mended")
	p.end()
}
