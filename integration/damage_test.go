package integration

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

const blockBytes = 512 * kib

// An object is a file of a store, which a test may damage and restore.
type object struct {
	t    testing.TB
	path string
	was  []byte
}

func (s *store) object(t testing.TB, key ...string) *object {
	t.Helper()
	path := filepath.Join(s.files, filepath.Join(key...))
	was, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return &object{t, path, was}
}

// set gives the object another content.
func (o *object) set(content []byte) {
	o.t.Helper()
	// In place, so that the server's own notes on the object stay.
	if err := os.WriteFile(o.path, content, 0o600); err != nil {
		o.t.Fatal(err)
	}
}

// flip inverts a bit at an offset.
func (o *object) flip(off int) {
	o.t.Helper()
	p := slices.Clone(o.was)
	p[off] ^= 4
	o.set(p)
}

// cut drops everything from an offset on.
func (o *object) cut(off int) {
	o.t.Helper()
	o.set(o.was[:off])
}

// hide makes the object absent.
func (o *object) hide() {
	o.t.Helper()
	if err := os.Rename(o.path, o.path+".hidden"); err != nil {
		o.t.Fatal(err)
	}
}

// heal makes the object what it was.
func (o *object) heal() {
	o.t.Helper()
	if err := os.Rename(o.path+".hidden", o.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		o.t.Fatal(err)
	}
	o.set(o.was)
}

// family is a snapshot and its parent, each with a pack: of 24 blocks, and of
// the 5 that the child changed.
type family struct {
	*store
	parent, child string
	disk          []byte // of the child
}

var childBlocks = []int{4, 5, 6, 7, 10}

func newFamily(t testing.TB, s *store) *family {
	t.Helper()
	h := newHost(t, s)
	disk := randomBytes(1, 24*blockBytes)
	image := h.image(disk)
	f := &family{store: s, parent: h.ok("snapshot", "create", image)}
	fill(newRand(2), disk[4*blockBytes:8*blockBytes])
	copy(disk[10*blockBytes+700:], "the child's")
	f.child = h.ok("snapshot", "create", "--parent", f.parent, writeImage(t, image, disk))
	f.disk = disk
	return f
}

func (f *family) pack(t testing.TB, snap string) *object {
	t.Helper()
	return f.object(t, "data", snap, "packs", "00000000")
}

func (f *family) leaves(t testing.TB, snap string) *object {
	t.Helper()
	return f.object(t, "data", snap, "leaves", "00000000")
}

// blocks returns the numbers from first to last.
func blocks(first, last int) (all []int) {
	for b := first; b <= last; b++ {
		all = append(all, b)
	}
	return all
}

// What is damaged in the store fails the reads of what was lost, and no others;
// nothing of it is kept, and once it is whole again, so is the mount.
func TestDamagedDataFailsOnlyTheReadsThatNeedIt(t *testing.T) {
	t.Parallel()
	f := newFamily(t, newS3Store(t))
	own, inherited := childBlocks, slices.DeleteFunc(blocks(0, 23), func(b int) bool { return slices.Contains(childBlocks, b) })
	const slot = blockBytes // of a block that does not compress; the table before it is small
	for _, c := range []struct {
		name   string
		damage func() []*object
		lost   []int // blocks
	}{
		{"a bit of an inherited block", func() []*object {
			o := f.pack(t, f.parent)
			o.flip(2*slot + slot/2)
			return []*object{o}
		}, []int{2}},
		{"a bit of an own block", func() []*object {
			o := f.pack(t, f.child)
			o.flip(slot / 2)
			return []*object{o}
		}, []int{4}},
		{"two blocks are exchanged", func() []*object {
			o := f.pack(t, f.parent)
			first := len(o.was) - 24*slot
			p := slices.Clone(o.was)
			copy(p[first+2*slot:], o.was[first+3*slot:first+4*slot])
			copy(p[first+3*slot:], o.was[first+2*slot:first+3*slot])
			o.set(p)
			return []*object{o}
		}, []int{2, 3}},
		{"a pack's table", func() []*object {
			o := f.pack(t, f.parent)
			o.flip(20)
			return []*object{o}
		}, nil}, // the index tells where blocks lie
		{"a pack's end", func() []*object {
			o := f.pack(t, f.parent)
			o.cut(12*slot + slot/2)
			return []*object{o}
		}, blocks(12, 23)},
		{"a pack is empty", func() []*object {
			o := f.pack(t, f.child)
			o.cut(0)
			return []*object{o}
		}, own},
		{"a pack is gone", func() []*object {
			o := f.pack(t, f.child)
			o.hide()
			return []*object{o}
		}, own},
		{"the parent's pack is gone", func() []*object {
			o := f.pack(t, f.parent)
			o.hide()
			return []*object{o}
		}, inherited},
		{"packs are exchanged", func() []*object {
			a, b := f.pack(t, f.parent), f.pack(t, f.child)
			a.set(b.was)
			b.set(a.was)
			return []*object{a, b}
		}, blocks(0, 23)},
		{"a bit of a leaf", func() []*object {
			o := f.leaves(t, f.child)
			o.flip(50)
			return []*object{o}
		}, blocks(0, 23)},
		{"a leaf's end", func() []*object {
			o := f.leaves(t, f.child)
			o.cut(100)
			return []*object{o}
		}, blocks(0, 23)},
		{"leaves are gone", func() []*object {
			o := f.leaves(t, f.child)
			o.hide()
			return []*object{o}
		}, blocks(0, 23)},
		{"another's leaves", func() []*object {
			o := f.leaves(t, f.child)
			o.set(f.leaves(t, f.parent).was)
			return []*object{o}
		}, blocks(0, 23)},
		{"the parent's leaves are gone", func() []*object {
			o := f.leaves(t, f.parent)
			o.hide()
			return []*object{o}
		}, nil}, // the child has its own
		{"a bit of the footer", func() []*object {
			o := f.leaves(t, f.child)
			o.flip(len(o.was) - 5)
			return []*object{o}
		}, nil}, // which only reclaim reads
		{"a bit of the root", func() []*object {
			o := f.object(t, "data", f.child, "root")
			o.flip(len(o.was) / 2)
			return []*object{o}
		}, nil}, // a small one is in the outcome too
		{"the root is gone", func() []*object {
			o := f.object(t, "data", f.child, "root")
			o.hide()
			return []*object{o}
		}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t, f.store)
			damaged := c.damage()
			heal := func() {
				for _, o := range damaged {
					o.heal()
				}
			}
			defer heal() // whatever comes of it: the others have the same store
			m := h.mount(f.child, "--no-hydrate", "--read-deadline", "2s")

			direct := m.open(os.O_RDONLY | oDirect)
			for b := range 24 {
				p := aligned(blockBytes)
				_, err := direct.ReadAt(p, int64(b)*blockBytes)
				switch {
				case slices.Contains(c.lost, b):
					if !isEIO(err) {
						t.Errorf("block %d: %v, want EIO", b, err)
					}
				case err != nil:
					t.Errorf("block %d: %v", b, err)
				default:
					sameBytes(t, fmt.Sprintf("block %d", b), p, f.disk[b*blockBytes:(b+1)*blockBytes])
				}
			}
			if told := strings.Join(m.status().Errors, "\n"); (len(c.lost) > 0) != strings.Contains(told, "snap-") {
				t.Errorf("status.json tells %q", told)
			}
			out := filepath.Join(h.dir, "out.img")
			r := h.run("snapshot", "export", f.child, out)
			if want := min(1, len(c.lost)); r.code != want {
				t.Errorf("%s\nwant exit %d", r, want)
			} else if want == 0 {
				sameBytes(t, "the export", readAt(t, out, 0, len(f.disk)), f.disk)
			} else if left := glob(t, filepath.Join(h.dir, "*out.img*")); len(left) > 0 {
				t.Errorf("the failed export left %v", left)
			}
			if r := h.run("snapshot", "verify", "--all"); r.code != 1 {
				t.Errorf("%s\nwant exit 1", r)
			}
			h.run("gc") // it may fail, and must do no harm

			heal()
			sameBytes(t, "once it is whole", readDirect(t, direct, 0, len(f.disk)), f.disk)
			if errs := m.status().Errors; len(errs) != 0 {
				t.Errorf("once it is whole: %q", errs)
			}
			h.ok("snapshot", "verify", "--all")
		})
	}
}

// Hydration goes around what is damaged, tells of it, and completes once it is
// whole.
func TestHydrationGoesAroundDamage(t *testing.T) {
	t.Parallel()
	f := newFamily(t, newS3Store(t))
	m := newHost(t, f.store).mount(f.child, "--no-hydrate")
	o := f.pack(t, f.parent)
	o.flip(2*blockBytes + blockBytes/2)
	m.h.ok("hydrate", "--resume", m.dir)
	waitFor(t, "all but one block are hydrated", time.Minute, func() bool { return m.status().HydratedBytes == 23*blockBytes })
	waitFor(t, "status.json tells of it", time.Minute, func() bool {
		return strings.Contains(strings.Join(m.status().Errors, "\n"), f.parent)
	})
	o.heal()
	m.waitState("hydrated", 2*time.Minute)
	m.equals(f.disk)
	if errs := m.status().Errors; len(errs) != 0 {
		t.Errorf("once it is whole: %q", errs)
	}
}

// A snapshot of a volume that needs damaged blocks fails and keeps the changes;
// one that does not need them is made.
func TestSnapshotInheritsNoDamageSilently(t *testing.T) {
	t.Parallel()
	f := newFamily(t, newS3Store(t))
	h := newHost(t, f.store)
	vol := h.ok("volume", "create", "--snapshot", f.child)
	m := h.mount(vol, "--no-hydrate", "--read-deadline", "2s")
	o := f.pack(t, f.parent)
	o.flip(2*blockBytes + blockBytes/2)
	page := f.disk[2*blockBytes : 2*blockBytes+4096] // the rest of its block is damaged
	fill(newRand(5), page)
	m.write(page, 2*blockBytes)
	h.fails(1, []string{"block 2", f.parent}, "snapshot", "create", vol)
	if listed := h.list(); len(listed) != 2 {
		t.Errorf("list shows %+v", listed)
	}
	sameBytes(t, "what was written", m.read(2*blockBytes, 4096), page)

	whole := f.disk[2*blockBytes : 3*blockBytes]
	fill(newRand(6), whole)
	m.write(whole, 2*blockBytes) // now nothing of it is needed
	next := h.ok("snapshot", "create", vol)
	m.equals(f.disk)
	sameBytes(t, "the snapshot", newHost(t, f.store).exported(next), f.disk)
	o.heal()
}

// A record that is damaged, missing or another's fails what needs it, by name,
// and changes nothing; what is mounted goes on.
func TestDamagedRecordsAreNamedAndDoNoHarm(t *testing.T) {
	t.Parallel()
	f := newFamily(t, newS3Store(t))
	lineage := f.child[len("snap-") : len("snap-")+8]
	type effect struct {
		code int // of a command
		word string
	}
	garbage := func(o *object) { o.cut(len(o.was) / 2) }
	gone := func(o *object) { o.hide() }
	for _, c := range []struct {
		name   string
		record []string
		damage func(*object)
		mount  effect
	}{
		{"half of the store's", []string{"store.json"}, garbage, effect{1, "store.json"}},
		{"no store's", []string{"store.json"}, gone, effect{3, "not a lazyvol store"}},
		{"half of the lineage's", []string{"lineages", lineage}, garbage, effect{1, lineage}},
		{"no lineage's", []string{"lineages", lineage}, gone, effect{3, lineage}},
		{"half of the outcome", []string{"outcomes", f.child}, garbage, effect{1, f.child}},
		{"another's outcome", []string{"outcomes", f.child}, func(o *object) { o.set(f.object(t, "outcomes", f.parent).was) }, effect{1, f.child}},
		{"no outcome", []string{"outcomes", f.child}, gone, effect{4, "pending"}},
		{"half of the intent", []string{"intents", f.child}, garbage, effect{}},
		{"another's intent", []string{"intents", f.child}, func(o *object) { o.set(f.object(t, "intents", f.parent).was) }, effect{}},
		{"no intent", []string{"intents", f.child}, gone, effect{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t, f.store)
			m := h.mount(f.child, "--no-hydrate", "--read-deadline", "2s")
			o := f.object(t, c.record...)
			c.damage(o)
			defer o.heal()
			over := newHost(t, f.store)
			dir := t.TempDir()
			r := over.run("mount", f.child, dir)
			if r.code != c.mount.code || !strings.Contains(r.stderr, c.mount.word) {
				t.Errorf("%s\nwant exit %d and %q", r, c.mount.code, c.mount.word)
			}
			if r.code == 0 {
				other := over.mounted(dir)
				other.equals(f.disk)
				other.unmount()
			}
			for _, args := range [][]string{{"gc"}, {"snapshot", "list"}, {"snapshot", "show", f.child}, {"snapshot", "verify", "--all"}, {"volume", "create", "--snapshot", f.child}} {
				if r := over.run(args...); r.code == 2 || r.code != 0 && !strings.Contains(r.stderr, "lazyvol: ") {
					t.Errorf("%s", r)
				}
			}
			m.equals(f.disk)

			o.heal()
			sameBytes(t, "the export", over.exported(f.child), f.disk)
			for vol := range strings.FieldsSeq(over.ok("volume", "list")) {
				if strings.HasPrefix(vol, "vol-") {
					over.ok("volume", "delete", vol)
				}
			}
			h.ok("snapshot", "verify", "--all")
		})
	}
}
