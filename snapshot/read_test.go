package snapshot_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// blockLog notes which blocks were read and which were bad.
type blockLog struct {
	mu        sync.Mutex // guards the fields below
	read, bad []int64
}

func (l *blockLog) noteRead(block int64, _ []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.read = append(l.read, block)
	return nil
}

func (l *blockLog) noteBad(block int64, _ error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.bad = append(l.bad, block)
}

// A block that cannot be read is reported, if anybody asks, and the others are
// read.
func TestReadAllGoesOnAfterABadBlock(t *testing.T) {
	plainAndSealed(t, testReadAllGoesOnAfterABadBlock)
}

func testReadAllGoesOnAfterABadBlock(t *testing.T, newWorld func(testing.TB) *world) {
	w := newWorld(t)
	d := newDevice(20*testBlock).random(1, span(0, 20)...)
	img := w.create(nil, nil, d)
	w.damageBlock(img, 20, 7)
	var log blockLog
	if err := img.ReadAll(w.ctx, log.noteRead, log.noteBad); err != nil || len(log.read) != 19 || !slices.Equal(log.bad, []int64{7}) {
		t.Errorf("read %v, bad are %v, %v", log.read, log.bad, err)
	}
	if err := img.ReadAll(w.ctx, log.noteRead, nil); !errors.Is(err, manifest.ErrCorrupt) || !strings.Contains(err.Error(), "block 7:") {
		t.Errorf("read: %v", err)
	}
}

// damageBlock flips a bit in a block of an image of blocks that do not
// compress, in one pack.
func (w *world) damageBlock(img *snapshot.Image, blocks, block int) {
	w.t.Helper()
	key := manifest.PackKey(img.ID(), 0)
	pack, _, err := w.faults.Get(w.ctx, key, blockstore.MaxObjectSize)
	if err != nil {
		w.t.Fatal(err)
	}
	pack[len(pack)-(blocks-block)*testBlock+100] ^= 0x80
	w.overwrite(key, string(pack))
}

// All blocks of a leaf that cannot be read are bad.
func TestReadAllGoesOnAfterABadLeaf(t *testing.T) { plainAndSealed(t, testReadAllGoesOnAfterABadLeaf) }

func testReadAllGoesOnAfterABadLeaf(t *testing.T, newWorld func(testing.TB) *world) {
	w := newWorld(t)
	img := w.create(nil, nil, newDevice(3*leafBytes-testBlock).tiny(1, 0, 1024, 1025, 3000))
	second := img.Root.Leaves[1]
	part, _, err := w.faults.Get(w.ctx, manifest.LeavesKey(img.ID(), 0), blockstore.MaxObjectSize)
	if err != nil {
		t.Fatal(err)
	}
	part[second.Offset+100] ^= 1
	w.overwrite(manifest.LeavesKey(img.ID(), 0), string(part))
	var log blockLog
	if err := img.ReadAll(w.ctx, log.noteRead, log.noteBad); err != nil {
		t.Fatal(err)
	}
	slices.Sort(log.read)
	if !slices.Equal(log.read, []int64{0, 3000}) || !slices.Equal(log.bad, span(1024, 2048)) {
		t.Errorf("read %v, bad are %v", log.read, log.bad)
	}
	if err := img.ReadAll(w.ctx, log.noteRead, nil); !errors.Is(err, manifest.ErrCorrupt) {
		t.Errorf("read: %v", err)
	}
}

// An error of the reader ends it at once, and is no damage.
func TestReadAllEndsWithItsReader(t *testing.T) { plainAndSealed(t, testReadAllEndsWithItsReader) }

func testReadAllEndsWithItsReader(t *testing.T, newWorld func(testing.TB) *world) {
	w := newWorld(t)
	img := w.create(nil, nil, sparse(20))
	boom := errors.New("boom")
	var log blockLog
	fail := func(block int64, data []byte) error { return errors.Join(log.noteRead(block, data), boom) }
	for range 20 {
		// A leaf further on does not arrive before that.
		w.faults.Inject(blockstoretest.Rule{Prefix: manifest.LeavesPrefix(img.ID()), Skip: 12, Times: 1}, blockstoretest.Fault{Hang: true})
		if err := img.ReadAll(w.ctx, fail, log.noteBad); !errors.Is(err, boom) || len(log.bad) > 0 {
			t.Errorf("read: %v, and bad are %v", err, log.bad)
		}
		w.faults.Heal()
	}
	dense := w.create(nil, nil, newDevice(20*testBlock).tiny(1, span(0, 20)...)) // one run
	log.read = nil
	if err := dense.ReadAll(w.ctx, fail, log.noteBad); !errors.Is(err, boom) || len(log.bad) > 0 || len(log.read) != 1 {
		t.Errorf("read: %v, after %v, and bad are %v", err, log.read, log.bad)
	}
}

// An exported image is the device, byte for byte, and no longer.
func TestExportIsTheDevice(t *testing.T) { plainAndSealed(t, testExportIsTheDevice) }

func testExportIsTheDevice(t *testing.T, newWorld func(testing.TB) *world) {
	for _, size := range []int64{0, 512, testBlock + 512, 20*testBlock - 512, leafBytes + 4096} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			w := newWorld(t)
			d := newDevice(size)
			if blocks := d.geometry.Blocks(); blocks > 0 {
				d = d.random(1, 0, blocks/3, blocks-1)
			}
			img := w.create(nil, nil, d)
			f, err := os.Create(filepath.Join(t.TempDir(), "image"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := f.Truncate(size); err != nil {
				t.Fatal(err)
			}
			var last, total int64
			err = img.Export(w.ctx, f, func(done, of int64) {
				if done <= last {
					t.Errorf("done %d after %d", done, last)
				}
				last, total = done, of
			})
			if err != nil {
				t.Fatal(err)
			}
			if last != total || total != int64(len(d.blocks))*testBlock {
				t.Errorf("done %d of %d", last, total)
			}
			got, err := os.ReadFile(f.Name())
			if err != nil {
				t.Fatal(err)
			}
			want := make([]byte, size)
			for block, data := range d.blocks {
				copy(want[block*testBlock:], data)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("the file differs, at %d bytes", len(got))
			}
		})
	}
}

// fullDisk has room for a few writes.
type fullDisk struct {
	mu   sync.Mutex // guards room
	room int
	err  error
}

func (f *fullDisk) WriteAt(p []byte, off int64) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.room--; f.room < 0 {
		return 0, f.err
	}
	return len(p), nil
}

func TestExportEndsAtTheFirstError(t *testing.T) { plainAndSealed(t, testExportEndsAtTheFirstError) }

func testExportEndsAtTheFirstError(t *testing.T, newWorld func(testing.TB) *world) {
	w := newWorld(t)
	img := w.create(nil, nil, newDevice(leafBytes).tiny(1, span(0, 200)...))
	full := errors.New("disk full")
	if err := img.Export(w.ctx, &fullDisk{room: 20, err: full}, nil); !errors.Is(err, full) {
		t.Errorf("export: %v", err)
	}
	w.faults.Inject(blockstoretest.Rule{Op: blockstoretest.OpReadRange, Prefix: "data/", Skip: 1}, blockstoretest.Fault{Err: blockstore.ErrUnavailable})
	if err := img.Export(w.ctx, &fullDisk{room: 1000}, nil); !errors.Is(err, blockstore.ErrUnavailable) {
		t.Errorf("export: %v", err)
	}
	w.faults.Heal()
	ctx, cancel := context.WithCancel(w.ctx)
	err := img.Export(ctx, &fullDisk{room: 1000}, func(done, total int64) { cancel() })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("export: %v", err)
	}
}
