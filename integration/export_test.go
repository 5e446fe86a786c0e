package integration

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// With --ignore-errors everything is restored that can be, the rest is zeros and
// listed; without it the export fails, and leaves nothing.
func TestExportOfADamagedSnapshot(t *testing.T) {
	t.Parallel()
	const size = 40 * mib
	disk := randomBytes(1, size)
	for name, c := range map[string]struct {
		harm func(s *store, snap string)
		bad  []string // lines, but for the snapshot's id
	}{
		"nothing": {func(*store, string) {}, nil},
		"a block": {func(s *store, snap string) { s.harm(t, "data/"+snap+"/packs/00000001", flipAt(mib)) },
			[]string{"17301504 524288 data/%s/packs/00000001 is damaged"}},
		"a pack": {func(s *store, snap string) { s.harm(t, "data/"+snap+"/packs/00000001", nil) },
			[]string{"16777216 16777216 data/%s/packs/00000001 is missing"}},
		"a leaf": {func(s *store, snap string) { s.harm(t, "data/"+snap+"/leaves/00000000", flipAt(100)) },
			[]string{"0 41943040 data/%s/leaves/00000000 is damaged"}},
		"the root, of which the outcome has a copy": {func(s *store, snap string) { s.harm(t, "data/"+snap+"/root", nil) }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, newDirStore(t))
			snap := h.ok("snapshot", "create", h.image(disk))
			c.harm(h.store, snap)
			file := filepath.Join(h.dir, "out.img")
			want := bytes.Clone(disk)
			var list strings.Builder
			for _, line := range c.bad {
				line = fmt.Sprintf(line, snap)
				var off, n int
				if _, err := fmt.Sscan(line, &off, &n); err != nil {
					t.Fatal(err)
				}
				clear(want[off : off+n])
				fmt.Fprintln(&list, line)
			}
			if len(c.bad) == 0 {
				h.ok("snapshot", "export", "--ignore-errors", snap, file)
				if left := glob(t, file+".bad"); len(left) != 0 {
					t.Errorf("left: %v", left)
				}
			} else {
				h.fails(1, nil, "snapshot", "export", snap, file)
				if left := glob(t, file+"*"); len(left) != 0 {
					t.Errorf("left: %v", left)
				}
				h.fails(1, []string{file + ".bad"}, "snapshot", "export", "--ignore-errors", snap, file)
				got, err := os.ReadFile(file + ".bad")
				if err != nil || string(got) != list.String() {
					t.Errorf("the list is %q, %v; want %q", got, err, list.String())
				}
			}
			sameBytes(t, "the export", readAt(t, file, 0, size), want)
		})
	}
}

// What the store lost this host's base may have.
func TestExportTakesFromTheBaseWhatTheStoreLost(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	disk := randomBytes(1, 8*mib)
	snap := h.ok("snapshot", "create", h.image(disk))
	m := h.mount(snap)
	m.waitState("hydrated", time.Minute)
	m.unmount()
	for key := range h.store.objects(t, "data") {
		h.store.harm(t, key, nil)
	}
	file := filepath.Join(h.dir, "out.img")
	h.ok("snapshot", "export", "--ignore-errors", snap, file)
	sameBytes(t, "the export", readAt(t, file, 0, 8*mib), disk)
}

// That the store cannot be reached is no damage.
func TestExportWithoutAStoreFailsWhateverItMayIgnore(t *testing.T) {
	t.Parallel()
	s, gate := newGatedStore(t)
	h := newHost(t, s)
	snap := h.ok("snapshot", "create", h.image(randomBytes(1, 4*mib)))
	gate.afflict(gets("packs"), (*exchange).hangUp)
	defer gate.relieve()
	file := filepath.Join(h.dir, "out.img")
	h.fails(1, nil, "snapshot", "export", "--ignore-errors", snap, file)
	if left := glob(t, file+"*"); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}
